"""Absolute values, weights of channels, normalised features: the definition, the fast path on a
CPU against float64, what is kept, and what is said of it."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pairwise
import pytest
import torch
from cases import BACKENDS, NARROW, agree, error, value_and_grad
from criteria import (
    DTYPES,
    KINDS,
    MIXED,
    NET,
    OPTIONS,
    C,
    agree_in_median,
    errors,
    loss_of,
    target_of,
    wide,
)
from policies import decided
from saved import left_by
from test_fast import LAYOUTS

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, functional, reference
from gpl_fast.distance import Distance, read
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

FLOAT, BF16, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPE = (2, C, 13, 18)
ALL = {**OPTIONS, **MIXED}
EPS = ((1e-10, False), (1e-8, True), (0.3, False), (0.3, True))


# Every criterion, over the norm with each eps or not.
DISTANCES = [
    distance
    for criterion in ("l2", "l1")
    for distance in (Distance(criterion), *(Distance(criterion, True, *eps) for eps in EPS))
]


def by_definition(a, b, d, weight=None):
    """Without the difference form."""
    if d.normalize:
        a, b = (
            e
            / ((e.square().sum(1, True) + d.eps * d.eps_inside).sqrt() + d.eps * (not d.eps_inside))
            for e in (a, b)
        )
    each = (a - b).abs() if d.criterion == "l1" else (a - b).square()
    return (each * (1 if weight is None else weight.view(1, -1, 1, 1))).mean(dim=(1, 2, 3))


# ---------------------------------------------------------------------------- the definition


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("d", DISTANCES, ids=str)
def test_the_reference_is_the_definition(d, weighted):
    a, b = torch.randn(2, 2, 5, 3, 4, dtype=DOUBLE)
    weight = torch.rand(5, dtype=DOUBLE) if weighted else None
    got, want = (
        value_and_grad(lambda x, f=f: f(x, b, d, weight), a)
        for f in (reference.feature_distance, by_definition)
    )
    agree(got, want, 1e-12)


@pytest.mark.parametrize("d", DISTANCES, ids=str)
def test_near_equal_features_are_exact_in_float64(d):
    """Where plain subtraction of units is left with few digits: against 100 digits' worth of it."""
    b = torch.randn(1, 4, 2, 3, dtype=DOUBLE)
    step = 1e-9 * torch.randn_like(b)
    got = reference.feature_distance(b + step, b, d)
    with_decimals = _in_longdouble(b + step, b, d)
    assert abs(float(got) / with_decimals - 1) < 1e-7 * (2 if d.normalize else 1)


def _in_longdouble(a, b, d):
    a, b = a.numpy().astype(np.longdouble), b.numpy().astype(np.longdouble)
    if d.normalize:
        inside, outside = (d.eps, 0) if d.eps_inside else (0, d.eps)
        a, b = (e / (np.sqrt((e * e).sum(1, keepdims=True) + inside) + outside) for e in (a, b))
    return float((abs(a - b) if d.criterion == "l1" else (a - b) ** 2).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ALL)
def test_gradcheck(option, kind):
    loss = loss_of(ALL[option], kind, "reference", DOUBLE)
    target = tuple(map(wide, target_of(kind, (1, C, 5, 6), 0)))
    if kind == "features":
        target = (loss.encode(*target),)
    x = torch.randn(1, C, 5, 6, dtype=DOUBLE, requires_grad=True)
    torch.autograd.gradcheck(lambda x: loss(x, *target), x, fast_mode=True)


@pytest.mark.parametrize("d", DISTANCES, ids=str)
def test_gradcheck_of_styles(d):
    a, b = torch.randn(2, 2, 3, 4, 5, dtype=DOUBLE)
    torch.autograd.gradcheck(lambda x: reference.style_distance(x, b, d), a.requires_grad_())


def test_absolute_values_of_grams_are_their_mean():
    a, b = torch.randn(2, 2, 3, 4, 5)
    want = (reference.gram(a) - reference.gram(b)).abs().mean(dim=(1, 2))
    torch.testing.assert_close(reference.style_distance(a, b, Distance("l1")), want)


@pytest.mark.parametrize("equal", ["both 0", "equal", "prediction 0", "target 0", "some pixels 0"])
@pytest.mark.parametrize("d", DISTANCES, ids=str)
def test_equal_and_zero_features_have_finite_gradients(d, equal):
    a, b = torch.randn(2, 1, 5, 3, 4)
    if equal in ("both 0", "prediction 0"):
        a.zero_()
    if equal in ("both 0", "target 0"):
        b.zero_()
    if equal == "some pixels 0":
        a[..., 0], b[..., 1], a[..., 2], b[..., 2] = 0, 0, 0, 0
    value, grad = value_and_grad(
        lambda x: reference.feature_distance(x, a if equal == "equal" else b, d), a
    )
    assert value.isfinite().all()
    assert grad.isfinite().all()
    if equal in ("equal", "both 0"):
        assert not value.any()
        assert not grad.any()
    if equal == "prediction 0" and d.normalize and not d.eps_inside:
        assert value > 0
        assert not grad.any()  # the choice of docs/math.md


# ------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dense", "features"])
def test_identities(kind, backend):
    """Of weights by channel, of doubled features, of scaled ones."""
    pred, target = torch.randn(SHAPE), target_of(kind, SHAPE, 1)

    def run(net=NET, **words):
        words = {"level_weights": (0.5, 2.0), "reduction": "none", **words}
        loss = GenericPerceptualLoss(C, net, backend=backend, **words)
        given = (loss.encode(*target),) if kind == "features" else target
        return value_and_grad(loss, pred, *given)

    for words in (OPTIONS["l1"], OPTIONS["normalized"], MIXED["l1-normalized"], {}):
        same = {**words, "level_weights": ([0.5] * 5, torch.full((8,), 2.0))}
        agree(run(**same), run(**words), 1e-6)
    absolute, doubled = run(**OPTIONS["l1"]), run(criterion="l1", level_weights=(1.0, 4.0))
    agree(doubled, [2 * t for t in absolute], 1e-6)


def test_normalised_features_do_not_feel_their_size():
    d = Distance("l2", True)
    a, b = torch.randn(2, 2, 5, 3, 4, dtype=DOUBLE)
    want = reference.feature_distance(a, b, d)
    torch.testing.assert_close(
        reference.feature_distance(7 * a, 0.1 * b, d), want, rtol=1e-8, atol=0
    )


def test_absolute_values_grow_as_the_features():
    a, b = torch.randn(2, 2, 5, 3, 4, dtype=DOUBLE)
    once, twice = (reference.feature_distance(k * a, k * b, Distance("l1")) for k in (1, 2))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-14, atol=0)


# ------------------------------------------------------------------- the fast path against float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by", ["cpu"])
@pytest.mark.parametrize("option", OPTIONS)
def test_against_float64(option, by, dtype, kind):
    draws = [
        errors(OPTIONS[option], kind, DTYPES[dtype], 2 * torch.randn(SHAPE), seed)
        for seed in range(24)
    ]
    agree_in_median(draws, DTYPES[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, "float64"])
@pytest.mark.parametrize("by", ["reference"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_reference_against_float64(option, by, dtype, kind):
    """Near what rounding of the features alone would do: the bounds are those of test_reference."""
    bound = {"float32": 1e-4, "bfloat16": 0.5, "float16": 0.25, "float64": 1e-12}[dtype]
    computed = DTYPES.get(dtype, DOUBLE)
    for seed in range(3):
        _, (value, grad) = errors(
            OPTIONS[option], kind, computed, 2 * torch.randn(SHAPE), seed, backend=by
        )
        assert value <= bound / 2
        assert grad <= bound


FACTORS = {
    "option": tuple(ALL),
    "kind": KINDS,
    "dtype": tuple(DTYPES),
    "pred": ("float32", "bfloat16", "float16"),
    "size": ((2, C, 13, 18), (1, C, 4, 4), (1, C, 9, 33), (3, C, 8, 7)),
    "masked": (False, True),
    "layout": tuple(LAYOUTS),
    "rows": (None, 2, 4),
    "reduction": ("none", "mean", "sum"),
}


def named(case):
    return "-".join(map(str, case.values())).replace(" ", "")


@pytest.mark.parametrize(
    "case", pairwise.covering(FACTORS, lambda case: False, lambda case: 0.0), ids=named
)
def test_every_two_options_together(case):
    dtype, draws = DTYPES[case["dtype"]], []
    coarse = max(dtype, DTYPES[case["pred"]], key=lambda t: torch.finfo(t).eps)
    for seed in range(24):
        torch.manual_seed(seed)
        pred = LAYOUTS[case["layout"]]((2 * torch.randn(case["size"])).to(DTYPES[case["pred"]]))
        mask = torch.rand(pred[:, 0].shape) < 0.8 if case["masked"] else None
        with decided(rows=case["rows"]):
            draws.append(
                errors(
                    ALL[case["option"]], case["kind"], dtype, pred, seed, mask,
                    reduction=case["reduction"],
                )
            )  # fmt: skip
    agree_in_median(draws, coarse)


TAPS = {
    "inside": ({"conv1_1": 1.0, "relu1_2": torch.rand(5), "conv2_1": 0.5}, {}),
    "ends": ({"relu1_1": 0.2, "pool1": [0.3] * 5, "pool2": 1.0}, {}),
    "beside style": ({"relu1_2": 1.0, "pool2": torch.rand(8)}, {"relu1_2": 3.0, "pool1": 1.0}),
    "style alone": ({}, {"relu1_1": 2.0, "pool2": 1.0}),
}


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("pool", ["max", "avg", "stride"])
@pytest.mark.parametrize("option", ["l2", "l1", "normalized", "l1-normalized"])
@pytest.mark.parametrize("taps", TAPS)
def test_taps_anywhere(taps, option, pool, rows):
    words, (features, styles) = ALL.get(option, {}), TAPS[taps]
    net = LossNet.vgg(C, (2, 1), NARROW, pool=pool)
    if pool == "stride":
        names = {"pool1": "down1", "pool2": "down2"}
        features, styles = (
            {names.get(tap, tap): w for tap, w in of.items()} for of in (features, styles)
        )
    draws = []
    for seed in range(12):
        torch.manual_seed(seed)
        pred, target, results = 2 * torch.randn(SHAPE), 2 * torch.randn(SHAPE), []
        for backend, dtype in (("reference", DOUBLE), ("reference", FLOAT), ("fast", FLOAT)):
            loss = PerceptualLoss(
                net, features, styles, backend=backend, compute_dtype=dtype, activation="softmax",
                reduction="none", **words,
            )  # fmt: skip
            exact = dtype == DOUBLE
            with decided(rows=rows):
                results.append(
                    value_and_grad(loss, wide(pred) if exact else pred,
                                   wide(target) if exact else target)
                )  # fmt: skip
        truth, plain, got = results
        draws.append([[error(a, b) for a, b in zip(r, truth, strict=True)] for r in (got, plain)])
    agree_in_median(draws, FLOAT)


def _beside_float64(losses, x, target):
    """Errors of value and gradient, relative: of the fast path and of PyTorch in x's dtype."""
    found = {}
    for by, backend, dtype in (("truth", "reference", DOUBLE), ("fast", "fast", x.dtype),
                               ("plain", "reference", x.dtype)):  # fmt: skip
        given = target.to(dtype) if target.is_floating_point() else target
        found[by] = value_and_grad(losses[backend], x.to(dtype), given)
    value, grad = found["truth"]
    return [
        (abs(v.double() / value - 1), (g.double() - grad).norm() / grad.norm())
        for v, g in (found["fast"], found["plain"])
    ]


@pytest.mark.parametrize("net", ["1,1", "2,2"])
@pytest.mark.parametrize("mean", [0, -7, -14])
def test_targets_whose_features_are_small_beside_the_predictions(mean, net):
    """Backgrounds of masks, dark images: a branch made of the other one and the difference would
    leave rounding there, which the norm makes as large as any feature."""
    words = {"activation": "sigmoid", "normalize_features": True}
    losses = {b: GenericPerceptualLoss(1, net, backend=b, **words) for b in BACKENDS}
    x, target = torch.randn(1, 1, 48, 48), torch.randn(1, 1, 48, 48) + mean
    if mean == 0:
        target = torch.zeros(1, 48, 48, dtype=torch.long)
        target[:, 8:14, 8:20] = 1
    for fast, plain in zip(*_beside_float64(losses, x, target), strict=True):
        assert fast <= 2 * plain + 2e-6


@pytest.mark.parametrize("normalize_features", [False, True])
@pytest.mark.parametrize("net", ["1", "1,1", "2,2"])
def test_signs_are_0_where_prediction_and_target_are_the_same(net, normalize_features):
    """Also beside a region where they differ: a transformed convolution would leave rounding."""
    words = {"activation": "none", "criterion": "l1", "normalize_features": normalize_features}
    losses = {b: GenericPerceptualLoss(3, net, backend=b, **words) for b in BACKENDS}
    x = torch.rand(1, 3, 64, 64)
    target = x.clone()
    target[:, :, 20:37, 11:30] = 0.5
    for fast, plain in zip(*_beside_float64(losses, x, target), strict=True):
        assert fast <= 2 * plain + 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ALL)
def test_a_prediction_equal_to_its_target_gives_zero(option, dtype):
    x = torch.randn(SHAPE)
    value, grad = value_and_grad(loss_of(ALL[option], "dense", "fast", DTYPES[dtype]), x, x)
    assert not value.any()
    assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ALL)
def test_black_images_have_finite_gradients(option, dtype, backend):
    """lpips' open issue: all features are 0, in one image or in both."""
    black, other = torch.zeros(2, C, 8, 8), torch.randn(2, C, 8, 8)
    loss = loss_of(ALL[option], "dense", backend, DTYPES[dtype], activation="none")
    for pred, target in ((black, black), (black, other), (other, black)):
        value, grad = value_and_grad(loss, pred, target)
        assert value.isfinite().all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1.0, 1e-4, 3e-7])
def test_float16_holds_seeds_of_small_features(size, backend):
    """They grow as one over the norm; PerceptualLoss of float32 predictions needs no GradScaler."""
    x, t = size * torch.rand(2, 2, C, 12, 12).double()
    words = {"criterion": "l2", "normalize_features": True, "activation": "none"}
    truth = value_and_grad(loss_of(words, "dense", "reference", DOUBLE), x, t)
    got = value_and_grad(loss_of(words, "dense", backend, HALF), x.float(), t.float())
    bound = {1.0: 0.05, 1e-4: 0.1, 3e-7: 2.0}[size]  # the last one's maps are subnormal
    assert all(t.isfinite().all() for t in got)
    assert all(error(a, b) < bound for a, b in zip(got, truth, strict=True))
    assert got[1].any()


@pytest.mark.parametrize("option", ALL)
def test_threads_and_chunks_do_not_change_much(option):
    pred, target = torch.randn(2, 3, C, 20, 24)
    loss = loss_of(ALL[option], "dense", "fast", FLOAT)
    one = value_and_grad(loss, pred, target)
    torch.set_num_threads(3)
    three = value_and_grad(loss, pred, target)
    torch.set_num_threads(1)
    assert all(map(torch.equal, one, three))
    with decided(rows=4):
        agree(value_and_grad(loss, pred, target), one, 1e-5)


@pytest.mark.parametrize("option", ALL)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend, option):
    x = torch.randn(0, C, 8, 8, requires_grad=True)
    value = loss_of(ALL[option], "dense", backend, FLOAT, reduction="mean")(x, x.detach())
    (grad,) = torch.autograd.grad(value, x)
    assert value == 0
    assert grad.shape == x.shape


# -------------------------------------------------------------------------- what is kept and said


@pytest.mark.parametrize("kind", ["dense", "features"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", ALL)
def test_as_many_bytes_are_kept_as_for_squares(option, dtype, kind):
    """One tensor a tap, whatever stands in it; normalised seeds of float16 are float32."""
    x, dense = torch.randn(2, 2, C, 16, 16)
    left = []
    for words in ({}, ALL[option]):
        loss = loss_of(words, kind, "fast", DTYPES[dtype])
        target = loss.encode(dense) if kind == "features" else dense
        left.append(left_by(loss(x.clone().requires_grad_(), target))[1])
    squares, got = left
    assert got.keys() == squares.keys()
    for name, t in got.items():
        is_wide = name.startswith("diff") and dtype == "float16" and "normalized" in option
        assert t.shape == squares[name].shape
        assert t.dtype == (FLOAT if is_wide else squares[name].dtype)


def test_the_seed_is_what_is_kept():
    """w δ, w sign δ; of normalised features the gradient by them."""
    x, t = 2 * torch.randn(2, 1, C, 16, 16)
    e, e_target = (NET.features(torch.softmax(m, 1), NET.levels) for m in (x, t))
    for words in ALL.values():
        loss = loss_of(words, "dense", "fast", FLOAT)
        weights = loss.weights.on(x)
        saved = left_by(loss(x.clone().requires_grad_(), t))[1]
        for tap in NET.levels:
            leaf, channels = e[tap].detach().requires_grad_(), weights.channels.get(tap)
            each = reference.feature_distance(leaf, e_target[tap], weights.distance, channels)
            (want,) = torch.autograd.grad(each.sum(), leaf)
            want = want * leaf[0].numel() / weights.distance.slope
            got = saved[f"diff.{tap}"].permute(0, 3, 1, 2)
            if weights.distance.criterion == "l1":
                got, want = got * (want.abs() > 1e-3), want * (want.abs() > 1e-3)
                assert error(got, want) < 0.02  # a sign near 0
            else:
                assert error(got, want) < 1e-4


@pytest.mark.parametrize("option", ALL)
def test_explain_says_the_fast_path_and_the_bytes(option):
    x, t = torch.randn(2, 2, C, 16, 16)
    loss = loss_of(ALL[option], "dense", "fast", FLOAT)
    said = loss.explain(x, t)
    assert said.backend == "fast"
    value = loss(x.clone().requires_grad_(), t)
    assert said.bytes_saved == sum(s.nbytes for s in left_by(value)[1].values())
    stage = "unit_diff_fwd" if "normalized" in option else "diff_reduce_fwd"
    assert sum(stage in run.forward for run in said.who) == 2
    assert loss_of(ALL[option], "dense", "reference", FLOAT).explain(x, t).backend == "reference"


def test_who_computes_on_a_gpu():
    """A block sums plain squares alone."""
    x = torch.empty(2, C, 32, 32, device="meta")
    for option, stage in (("l1", "diff_reduce_fwd"), ("normalized", "unit_diff_fwd")):
        said = loss_of(OPTIONS[option], "dense", "auto", BF16).explain(x, x, architecture="sm_90")
        assert [f"{stage} (Triton)" in run.forward for run in said.who] == [False, True, True]
    loss = GenericPerceptualLoss(C, NET, level_weights=(1.0, [1.0] * 8), compute_dtype=BF16)
    runs = loss.explain(x, x, architecture="sm_90").who
    assert ["diff_reduce_fwd" in run.forward for run in runs] == [False, False, True]


# ------------------------------------------------------------------------ weights as they are held


def test_weights_may_be_lists_arrays_and_tensors(backend):
    x, t = torch.randn(2, *SHAPE)
    values = [0.5, 0.0, 3.0, 1.0, 0.25, 2.0, 0.125, 1.5]
    forms = (values, tuple(values), np.array(values), np.float32(values), torch.tensor(values))
    found = [
        value_and_grad(
            GenericPerceptualLoss(C, NET, level_weights=[0.0, form], backend=backend), x, t
        )
        for form in forms
    ]
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))
    plain = functional.generic_perceptual_loss(
        x, t, NET, level_weights=[0.0, torch.tensor(values)], backend=backend
    )
    torch.testing.assert_close(plain, found[0][0])


def test_numbers_of_float64_stay_as_they_are():
    """0.3 is not rounded to float32 on its way."""
    x, t = torch.randn(2, *SHAPE, dtype=DOUBLE)
    losses = [GenericPerceptualLoss(C, NET, level_weights=[0, w]) for w in (0.3, [0.3] * 8)]
    a, b = (loss(x, t) for loss in losses)
    assert abs(float(a / b) - 1) < 1e-14


@pytest.mark.parametrize("option", ["l1", "channels"])
def test_a_loss_has_no_buffers_and_travels(option):
    loss = GenericPerceptualLoss(C, NET, **OPTIONS[option], backend="fast")
    assert not loss.state_dict()
    assert not [*loss.buffers(), *loss.parameters()]
    x, t = torch.randn(2, *SHAPE)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        torch.testing.assert_close(other(x, t), loss(x, t))
    assert ("0.25" in repr(loss)) == (option == "channels")
    shown = repr(GenericPerceptualLoss(C, NET, criterion="l1", normalize_features=True))
    assert "criterion='l1'" in shown
    assert "normalize_features=True" in shown


def test_a_level_whose_channels_are_all_0_is_not_compared():
    loss = GenericPerceptualLoss(C, NET, level_weights=[[0.0] * 5, 1.0])
    assert list(loss.taps) == ["pool2"]


def test_errors_say_what_is_expected():
    cases = {
        "criterion": lambda: GenericPerceptualLoss(C, NET, criterion="l3"),
        "normalize_features": lambda: GenericPerceptualLoss(C, NET, normalize_features=1),
        r"level_weights: pool1: got shape \(4,\)": lambda: GenericPerceptualLoss(
            C, NET, level_weights=[[1.0] * 4, 1.0]
        ),
        "level_weights: pool1.*>= 0": lambda: GenericPerceptualLoss(
            C, NET, level_weights=[[1, 1, 1, 1, -1], 1.0]
        ),
        "level_weights: pool2.*finite": lambda: GenericPerceptualLoss(
            C, NET, level_weights=[1.0, torch.full((8,), torch.nan)]
        ),
        "style_layers: pool1.*one number": lambda: PerceptualLoss(NET, {}, {"pool1": [1.0] * 5}),
        "level_weights.*>= 0": lambda: functional.generic_perceptual_loss(
            torch.randn(SHAPE), torch.randn(SHAPE), NET, level_weights=[0, -torch.ones(8)]
        ),
        "not all 0": lambda: GenericPerceptualLoss(C, NET, level_weights=[[0.0] * 5, 0]),
        "on 'meta'": lambda: GenericPerceptualLoss(
            C, NET, level_weights=[1, torch.ones(8, device="meta")]
        ),
    }
    for words, make in cases.items():
        with pytest.raises(ValueError, match=words):
            make()


def test_weights_of_a_modules_channels_are_counted_when_it_runs():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
    net = LossNet.from_module(module, {"relu": "1"}, in_channels=3)
    x = torch.rand(2, 1, 3, 8, 8)
    assert PerceptualLoss(net, {"relu": [1.0] * 4})(*x) > 0
    with pytest.raises(ValueError, match=r"relu: got 5.* 4 channels"):
        PerceptualLoss(net, {"relu": [1.0] * 5})(*x)


def test_a_distance_is_its_text():
    for d in (*DISTANCES, Distance("l1", True, 1 / 3, True)):
        assert read(d.text) == d
