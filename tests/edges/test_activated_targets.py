"""A target that is a probability map already: refused with both ways out, never activated twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from gpl_fast import GenericPerceptualLoss, PerceptualLoss, SegmentationLoss, functional, reference
from gpl_fast.targets import dense, first_look, values

SIZE = (32, 40)


def one_hot(n=2, c=5):
    return F.one_hot(torch.randint(0, c, (n, *SIZE)), c).permute(0, 3, 1, 2).float()


def probabilities(dtype=torch.float32, c=5):
    return torch.randn(2, c, *SIZE).mul(3).softmax(dim=1).to(dtype)


def with_ignored():
    y = one_hot()
    y[:, :, 3:9] = 0
    return y


REFUSED = {
    "one-hot": ("softmax", one_hot),
    "one-hot with ignored pixels": ("softmax", with_ignored),
    "multi-hot": ("softmax", lambda: (torch.rand(2, 5, *SIZE) > 0.5).float()),
    "teacher": ("softmax", probabilities),
    "teacher in bfloat16": ("softmax", lambda: probabilities(torch.bfloat16)),
    "teacher in float16": ("softmax", lambda: probabilities(torch.float16)),
    "teacher in float64": ("softmax", lambda: probabilities(torch.float64)),
    "teacher of many classes": ("softmax", lambda: probabilities(torch.bfloat16, 300)),
    "mask": ("sigmoid", lambda: (torch.rand(2, 1, *SIZE) > 0.5).float()),
    "multi-hot masks": ("sigmoid", lambda: (torch.rand(2, 5, *SIZE) > 0.5).float()),
    "soft mask": ("sigmoid", lambda: torch.rand(2, 1, *SIZE)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_probabilities_are_refused_with_both_ways_out(case, backend):
    activation, make = REFUSED[case]
    y = make()
    pred = torch.randn(y.shape)
    options = {"activation": activation, "backend": backend, "compute_dtype": torch.float32}
    loss = GenericPerceptualLoss(y.shape[1], **options)
    if y.dtype == torch.float64:
        options = {"activation": activation}
        loss, pred = GenericPerceptualLoss(y.shape[1], **options), pred.double()
    for call in (lambda: loss(pred, y), lambda: loss.encode(y)):
        with pytest.raises(ValueError, match="target: got values that are probabilities") as caught:
            call()
        assert "target_activation='none'" in str(caught.value)
        assert "'same'" in str(caught.value)
    # "none" compares with the map itself, by the definition in float64.
    plain = GenericPerceptualLoss(y.shape[1], target_activation="none", **options)
    act = {"softmax": lambda x: x.softmax(1), "sigmoid": torch.sigmoid}[activation]
    net = plain.net
    maps = torch.cat([act(pred.double()), y.double()])
    level = net.levels[-1]
    e = reference.features(
        maps, net.layers, net.weights_on(torch.device("cpu"), torch.float64), [level]
    )
    want = F.mse_loss(*e[level].chunk(2))
    torch.testing.assert_close(plain(pred, y).double(), want, rtol=1e-4, atol=0)


def test_a_mask_is_the_same_target_as_integers_and_as_floats():
    m = (torch.rand(2, 1, 64, 64) > 0.5).float()
    options = {"activation": "sigmoid"}
    right = m * 16 - 8
    as_map = GenericPerceptualLoss(1, target_activation="none", **options)(right, m)
    torch.testing.assert_close(as_map, GenericPerceptualLoss(1, **options)(right, m.long()))
    # "same": these really are logits, and equal ones are no distance apart.
    assert GenericPerceptualLoss(1, target_activation="same", **options)(m, m) == 0


def nearly(change):
    y = probabilities()
    change(y)
    return y


@pytest.mark.parametrize(
    ("activation", "target"),
    {
        "logits": ("softmax", lambda: torch.randn(2, 5, *SIZE)),
        "one value below 0": ("softmax", lambda: nearly(lambda y: y[1, 4, 31, 39].fill_(-1e-3))),
        "one sum off": ("softmax", lambda: nearly(lambda y: y[1, :, 31, 39].mul_(0.99))),
        "one value above 1": ("sigmoid", lambda: nearly(lambda y: y[1, 4, 31, 39].fill_(1.01))),
        "NaN at one pixel": ("softmax", lambda: nearly(lambda y: y[1, 4, 31, 39].fill_(torch.nan))),
        "log-probabilities": ("softmax", lambda: probabilities().log()),
    }.values(),
    ids=lambda x: "",
)
def test_logits_are_no_probabilities(activation, target, backend):
    y = target()
    loss = GenericPerceptualLoss(5, activation=activation, backend=backend)
    assert loss(torch.randn(2, 5, *SIZE), y).dim() == 0


def test_what_a_mask_leaves_out_is_not_looked_at(backend):
    y, pred = probabilities(), torch.randn(2, 5, *SIZE)
    valid = torch.rand(2, *SIZE) > 0.2
    loss = GenericPerceptualLoss(5, backend=backend)
    garbage = torch.where(valid.unsqueeze(1), y, 1e4)
    with pytest.raises(ValueError, match="probabilities already"):
        loss(pred, garbage, valid)
    logits = torch.where(valid.unsqueeze(1), 10 * y, y)
    assert loss(pred, logits, valid).isfinite()
    assert loss(pred, y, torch.zeros_like(valid)) == 0  # nothing to look at


def test_no_activation_means_nothing_to_refuse(backend):
    depth = torch.rand(2, 1, *SIZE)
    loss = GenericPerceptualLoss(1, activation="none", backend=backend)
    assert loss(depth, depth) == 0
    assert PerceptualLoss(loss.net, {"pool5": 1.0}, backend=backend)(depth, depth) == 0


@pytest.mark.parametrize("word", ["same", "softmax", "sigmoid", "none"])
def test_a_word_that_was_given_is_not_doubted(word, backend):
    y, pred = probabilities(), torch.randn(2, 5, *SIZE)
    loss = GenericPerceptualLoss(5, target_activation=word, backend=backend)
    assert loss(pred, y).isfinite()


def test_teacher_and_style_target_too():
    total = SegmentationLoss(5)
    pred, labels = torch.randn(2, 5, *SIZE), torch.randint(0, 5, (2, *SIZE))
    with pytest.raises(ValueError, match="teacher: got values that are probabilities"):
        total(pred, labels, teacher=probabilities())
    with pytest.raises(ValueError, match="probabilities already"):
        total.encode(probabilities())
    style = PerceptualLoss(total.net, {"relu1_1": 1.0}, {"relu1_1": 1.0}, activation="softmax")
    with pytest.raises(ValueError, match="style_target: got values that are probabilities"):
        style(pred, torch.randn_like(pred), probabilities())


def test_plain_functions_look_as_well():
    loss = GenericPerceptualLoss(5)
    with pytest.raises(ValueError, match="probabilities already"):
        functional.generic_perceptual_loss(torch.randn(2, 5, *SIZE), probabilities(), loss.net)


def test_a_compiled_graph_raises_when_it_runs(backend):
    pred = torch.randn(2, 5, *SIZE, requires_grad=True)
    logits, y = torch.randn(2, 5, *SIZE), probabilities()
    loss = GenericPerceptualLoss(5, backend=backend)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(pred, logits), loss(pred, logits))
    with pytest.raises(ValueError, match="probabilities already"):
        compiled(pred, y)


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 30), st.integers(1, 30), st.data())
def test_one_pixel_anywhere_settles_it(n, c, h, w, data):
    """`holds_probabilities` looks in growing blocks: the last pixel counts like the first."""
    y = torch.randn(n, c, h, w).softmax(dim=1)
    assert dense.holds_probabilities(y, None, "softmax")
    assert dense.holds_probabilities(y, None, "sigmoid")
    at = tuple(data.draw(st.integers(0, size - 1)) for size in (n, c, h, w))
    y[at] += 2
    assert not dense.holds_probabilities(y, None, "softmax")
    assert not dense.holds_probabilities(y, None, "sigmoid")
    valid = torch.ones(n, h, w, dtype=torch.bool)
    valid[at[0], at[2], at[3]] = False
    assert dense.holds_probabilities(y, valid, "softmax") == bool(valid.any())


def test_elsewhere_than_on_the_cpu_the_first_call_looks_alone(monkeypatch):
    """As on a GPU, where every look would stop the device."""
    monkeypatch.setattr(values, "may_look", lambda t: False)
    looks = []
    monkeypatch.setattr(dense, "refuse_dense", lambda *args: looks.append(args[-1]))
    pred, y = torch.randn(2, 5, *SIZE), probabilities()
    loss, total = GenericPerceptualLoss(5), SegmentationLoss(5)
    labels = torch.randint(0, 5, (2, *SIZE))
    loss(pred, labels)
    assert looks == []  # there was no dense target yet
    for _ in range(3):
        loss(pred, y)
        total(pred, labels, teacher=y)
    assert looks == ["target", "teacher"]
    monkeypatch.undo()
    monkeypatch.setattr(values, "may_look", lambda t: False)
    with pytest.raises(ValueError, match="probabilities already"):
        first_look(loss.options, target=(y, None))


def test_the_target_as_it_is_is_not_divided_by_the_temperature(backend):
    pred, y = torch.randn(2, 5, 64, 64) * 3, torch.randn(2, 5, 64, 64).softmax(dim=1)
    at = GenericPerceptualLoss(5, temperature=3.0, target_activation="none", backend=backend)
    one = GenericPerceptualLoss(5, target_activation="none", backend="reference")
    want = one((pred / 3).double(), y.double())
    torch.testing.assert_close(at(pred, y).double(), want, rtol=1e-4, atol=0)
    torch.testing.assert_close(at(pred, at.encode(y)).double(), want, rtol=1e-4, atol=0)
    # Without an activation on either side both are divided.
    depth = GenericPerceptualLoss(5, temperature=3.0, activation="none", backend=backend)
    plain = GenericPerceptualLoss(5, activation="none", backend="reference")
    want = plain((pred / 3).double(), (y / 3).double())
    torch.testing.assert_close(depth(pred, y).double(), want, rtol=1e-4, atol=0)


def test_stored_features_keep_the_resolved_word():
    words = {
        word: GenericPerceptualLoss(5, target_activation=word).encode(torch.randn(1, 5, *SIZE))
        for word in ("auto", "same", "softmax")
    }
    assert {f.settings["activation"] for f in words.values()} == {"softmax"}
    loss = GenericPerceptualLoss(5)
    assert len({float(loss(torch.zeros(1, 5, *SIZE), words["same"])) for _ in range(2)}) == 1


@pytest.mark.parametrize("size", [(33, 41), (40, 40), (64, 50), (119, 97)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_one_hot_maps_that_were_resized_are_still_probabilities(size, mode):
    """A resize leaves values such as 1.0000001."""
    options = {"align_corners": False} if mode == "bilinear" else {}
    for y, activation in ((one_hot(), "softmax"), (one_hot()[:, :1], "sigmoid")):
        target = F.interpolate(y, size=size, mode=mode, **options)
        loss = GenericPerceptualLoss(target.shape[1], activation=activation)
        with pytest.raises(ValueError, match="probabilities already"):
            loss(torch.randn(target.shape), target)


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_on_the_reference_look_too(transform):
    loss, y = GenericPerceptualLoss(5, backend="reference"), probabilities()
    pred = torch.randn(2, 5, *SIZE)
    calls = {
        "grad": lambda: torch.func.grad(lambda x: loss(x, y))(pred),
        "vmap": lambda: torch.func.vmap(loss)(torch.stack([pred, pred]), torch.stack([y, y])),
    }
    with pytest.raises(ValueError, match="probabilities already"):
        calls[transform]()


def test_modes_whose_tensors_hold_no_values():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    loss, total = GenericPerceptualLoss(5, backend="reference"), SegmentationLoss(5)
    pred, target = torch.randn(2, 5, *SIZE), torch.randn(2, 5, *SIZE)
    traced = make_fx(loss)(pred, target)
    torch.testing.assert_close(traced(pred, target), loss(pred, target))
    labels = torch.randint(0, 5, (2, *SIZE))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(pred).requires_grad_()
        loss(x, mode.from_tensor(target)).backward()
        assert x.grad.shape == x.shape
        reference_total = SegmentationLoss(5, net=total.net, backend="reference")
        value = reference_total(x, mode.from_tensor(labels), mode.from_tensor(target[:, :, ::2]))
        assert value.shape == ()
