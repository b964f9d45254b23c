"""`LPIPS` by its definition, on a narrow network: values and gradients of every kind of call, its
file, its copies. Against the packages themselves: tests/peers."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import ATOL, error, value_and_grad
from torch import nn

import gpl_fast
from gpl_fast import LPIPS, BackendUnavailable, LossNet, TopK

WIDTHS = (13, 10, 9)  # odd ones pad in packed arrays
LAYERS = ("relu1_2", "relu2_1", "relu3_1")
MEAN, STD = (-0.03, -0.09, -0.19), (0.46, 0.45, 0.44)
N, H, W = 2, 21, 26


def trunk(seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts, c = [], 3
    for block, (width, count) in enumerate(zip(WIDTHS, (2, 1, 1), strict=True)):
        parts += [nn.MaxPool2d(2)] if block else []
        for _ in range(count):
            parts += [nn.Conv2d(c, width, 3, padding=1), nn.ReLU()]
            parts[-2].weight.data = torch.randn(width, c, 3, 3, generator=generator) / (3 * c**0.5)
            # So that no position is left without features: 1 / R' decides there.
            parts[-2].bias.data = 0.3 + 0.1 * torch.randn(width, generator=generator)
            c = width
    return nn.Sequential(*parts)


def chain(**words):
    return LossNet.from_sequential(trunk(), **{"mean": MEAN, "std": STD, **words})


def module():
    """The same as a network of modules, which the reference alone runs."""
    taps = {layer: path for layer, path in zip(LAYERS, ("3", "6", "9"), strict=True)}
    return LossNet.from_module(trunk(), taps, mean=MEAN, std=STD)


def heads(signed=True):
    generator = torch.Generator().manual_seed(3)
    drawn = {k: torch.randn(c, generator=generator) for k, c in zip(LAYERS, WIDTHS, strict=True)}
    return drawn if signed else {k: h.abs() for k, h in drawn.items()}


def pictures(apart=0.3, dtype=torch.float32, n=N, h=H, w=W):
    """Two batches in [-1, 1]; the second is the first and noise."""
    x = torch.rand(n, 3, h, w) * 2 - 1
    y = (x + apart * torch.randn(n, 3, h, w)).clamp(-1, 1)
    return x.to(dtype), y.to(dtype)


def unit(e, eps, inside):
    square = e.square().sum(dim=1, keepdim=True)
    norm = (square + eps).sqrt() if inside else square.sqrt() + eps
    return e / norm


def by_definition(x, y, weights=None, *, eps=1e-10, inside=False, scale=(MEAN, STD), spatial=False):
    """Zhang et al., eq. (1), (N,); with `spatial` the map. Features are in the maps' dtype."""
    net, size = trunk().to(x.dtype), x.shape[2:]
    mean, std = (torch.tensor(t, dtype=x.dtype).view(1, 3, 1, 1) for t in scale)
    x, y = (x - mean) / std, (y - mean) / std
    total = 0
    for i, part in enumerate((net[:4], net[4:7], net[7:])):
        x, y = part(x), part(y)
        a, b = (e.to(torch.promote_types(e.dtype, torch.float32)) for e in (x, y))
        d = (unit(a, eps, inside) - unit(b, eps, inside)).square()
        h = torch.ones(WIDTHS[i]) if weights is None else weights[LAYERS[i]]
        at = (d * h.to(d.dtype).view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        if spatial:
            at = F.interpolate(at, size=size, mode="bilinear", align_corners=False)
        total = total + (at if spatial else at.mean(dim=(1, 2, 3)))
    return total


def target_of(kind, loss, y):
    """Of a kind, and the map that it is."""
    if kind == "dense":
        return y, y
    if kind == "features":
        return loss.encode(y), y
    labels = torch.randint(3, (len(y), *y.shape[2:]))
    if kind == "labels":
        return labels, F.one_hot(labels, 3).movedim(-1, 1).to(y.dtype)
    values, indices = torch.softmax(3 * y, dim=1).topk(2, dim=1)
    shown = torch.zeros_like(y).scatter_(1, indices, values / values.sum(dim=1, keepdim=True))
    return TopK(values, indices), shown


HALVES_AND_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


KINDS = ("dense", "labels", "topk", "features")


def cells(backend, name, dtypes=HALVES_AND_FLOAT, kinds=KINDS):
    return [
        pytest.param(backend, dtype, kind, id=f"lpips-{name}-{str(dtype)[6:]}-{kind}")
        for dtype in dtypes
        for kind in kinds
    ]


@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    [
        *cells("reference", "reference", (torch.float64, *HALVES_AND_FLOAT)),
        *cells("fast", "cpu"),
    ],
)
def test_value_and_gradient_by_definition(backend, dtype, kind):
    """At most twice PyTorch's own error in the same dtype, by the median of nine draws: winners
    that rounding swaps decide the gradient's."""
    if dtype == torch.float64:
        ours, _ = errors_of(backend, dtype, kind)
        assert max(ours) < 1e-12
    else:
        assert_exact(backend, dtype, kind, 9)


@pytest.mark.parametrize(("backend", "dtype", "kind"), cells("fast", "cpu"))
def test_a_map_and_its_gradient_by_definition(backend, dtype, kind):
    assert_exact(backend, dtype, kind, 9, spatial=True)


def assert_exact(backend, dtype, kind, draws, size=(H, W), slack=0.0, spatial=False):
    errors = torch.tensor([errors_of(backend, dtype, kind, size, spatial) for _ in range(draws)])
    ours, plain = errors.median(dim=0).values  # of value and gradient
    assert (ours <= 2 * plain + ATOL[dtype] + slack).all(), (ours, plain)


def errors_of(backend, dtype, kind, size=(H, W), spatial=False):
    """Of value and gradient, relative: ours, and PyTorch's with features in `dtype`. With `spatial`
    of the map, by a random gradient that comes in."""
    x, y = pictures(dtype=dtype, h=size[0], w=size[1])
    weight = torch.randn(N, 1, *size) if spatial else 1
    loss = LPIPS(chain(), heads(False), spatial=spatial, compute_dtype=dtype, backend=backend)
    target, shown = target_of(kind, loss, y)

    def plain(p):
        found = by_definition(p, shown.to(p.dtype), heads(False), spatial=spatial)
        return found * weight if spatial else found.mean()

    truth = value_and_grad(plain, x.double())
    found = value_and_grad(lambda p: loss(p, target) * weight, x), value_and_grad(plain, x)
    return [[error(a, b) for a, b in zip(got, truth, strict=True)] for got in found]


OPTIONS = {
    "eps inside": {"eps": 1e-8, "eps_inside": True},
    "a large eps": {"eps": 0.5},
    "signed heads": {},
    "no heads": {"heads": None},
}


@pytest.mark.parametrize("net", [chain, module])
@pytest.mark.parametrize("option", OPTIONS)
def test_options_in_float64(net, option):
    words = {"heads": heads(), **OPTIONS[option]}
    x, y = pictures(dtype=torch.float64)
    got = value_and_grad(LPIPS(net(), reduction="none", **words), x, y)
    eps, inside = words.get("eps", 1e-10), words.get("eps_inside", False)
    want = value_and_grad(lambda p: by_definition(p, y, words["heads"], eps=eps, inside=inside), x)
    assert got[0].shape == (N,)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("spatial", [False, True])
def test_gradcheck(inside, spatial):
    x, y = pictures(dtype=torch.float64, n=1, h=6, w=9)
    loss = LPIPS(chain(), heads(), eps=1e-3, eps_inside=inside, spatial=spatial)
    assert torch.autograd.gradcheck(lambda p: loss(p, y), x.requires_grad_())


# --------------------------------------------------------------------------- images at the edge


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("value", [-1.0, 0.0])
def test_identical_images_are_0_with_a_finite_gradient(backend, value, spatial):
    """Also where every feature of a layer is 0: the slope of a norm is infinite there."""
    dead = trunk()
    for layer in dead:
        if isinstance(layer, nn.Conv2d):
            layer.bias.data.fill_(-9.0)
    for layers in (dead, trunk()):
        net = LossNet.from_sequential(layers, mean=MEAN, std=STD)
        loss = LPIPS(net, backend=backend, spatial=spatial)
        x = torch.full((N, 3, H, W), value)
        got, grad = value_and_grad(loss, x, x.clone())
        assert torch.equal(got, torch.zeros_like(got))
        assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("spatial", [False, True])
def test_identical_pictures_are_0_in_every_dtype(backend, spatial, dtype):
    """Both branches' features are rounded alike, in strips too."""
    x, _ = pictures(dtype=dtype, h=65, w=54)
    loss = LPIPS(chain(), heads(), spatial=spatial, backend=backend)
    little = loss.explain(x, x).workspace_bytes
    for mb in ("auto", *([0.4 * little / 2**20] if backend == "fast" else [])):
        again = LPIPS(chain(), heads(), spatial=spatial, backend=backend, workspace_mb=mb)
        got, grad = value_and_grad(again, x, x.clone())
        assert not got.any()
        assert not grad.any()


def test_a_position_without_features_against_one_with_some(backend):
    """n(φ') = 0 there: the value counts ‖n(φ)‖², the gradient is 0 (docs/math.md)."""
    net = LossNet.from_sequential(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.ReLU()))
    x, y = torch.zeros(1, 3, 8, 8), torch.rand(1, 3, 8, 8)
    phi = torch.relu(F.conv2d(y, net.weights["conv1_1"]))
    got, grad = value_and_grad(LPIPS(net, backend=backend), x, y)
    assert float(got) == pytest.approx(float((phi.norm(dim=1) > 0).float().mean()), rel=1e-5)
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_images(backend, spatial, dtype):
    x = torch.zeros(0, 3, H, W, requires_grad=True, dtype=dtype)
    value = LPIPS(chain(), heads(), spatial=spatial, backend=backend)(x, x.detach())
    assert value.shape == ((0, 1, H, W) if spatial else ())
    value.sum().backward()
    assert value.sum() == 0
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("spatial", [False, True])
def test_a_mask_is_the_outside_of_the_image(backend, spatial):
    """Both maps are 0 behind mean and std where a pixel does not count: NaN there is harmless."""
    x, y = pictures()
    mask = torch.rand(N, H, W) > 0.2
    zero = torch.tensor(MEAN).view(1, 3, 1, 1)
    loss = LPIPS(chain(), heads(), spatial=spatial, backend=backend)
    seen = mask.unsqueeze(1)
    want = value_and_grad(loss, torch.where(seen, x, zero), torch.where(seen, y, zero))
    x_holes, y_holes = (torch.where(seen, t, torch.nan) for t in (x, y))
    got = value_and_grad(loss, x_holes, y_holes, mask)
    assert error(got[0], want[0]) < 1e-5
    assert error(got[1], torch.where(seen, want[1], 0)) < 1e-4
    stored = loss.encode(y_holes, mask)
    again = value_and_grad(loss, x, stored)
    assert error(again[0], got[0]) < 1e-4


def test_weights_of_pixels(backend):
    """Multiply both maps behind mean and std; 0 and 1 are the bool mask, bit for bit."""
    x, y = pictures()
    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    m = torch.rand(N, 1, H, W) * (torch.rand(N, 1, H, W) > 0.2)
    loss = LPIPS(chain(), heads(), backend=backend)
    weighed = (mean + m * (t - mean) for t in (x, y))
    want = value_and_grad(loss, *weighed)
    got = value_and_grad(loss, x, y, m)
    assert error(got[0], want[0]) < 1e-5
    assert error(got[1], m * want[1]) < 1e-4
    assert all_equal(value_and_grad(loss, x, y, (m > 0).float()), value_and_grad(loss, x, y, m > 0))


# ------------------------------------------------------------------------------ ranges, reductions


@pytest.mark.parametrize("normalised", [True, False])
def test_inputs_in_0_1(backend, normalised):
    words = {} if normalised else {"mean": None, "std": None}
    x, y = pictures()
    loss = LPIPS(chain(**words), heads(), backend=backend)
    unit_range = LPIPS(chain(**words), heads(), normalize=True, backend=backend)
    want = value_and_grad(loss, x, y)
    got = value_and_grad(unit_range, (x + 1) / 2, (y + 1) / 2)
    assert error(got[0], want[0]) < 1e-5
    assert error(got[1], 2 * want[1]) < 1e-4
    assert unit_range.normalize
    assert unit_range.fingerprint() != loss.fingerprint()
    with pytest.raises(ValueError, match=r"normalize.*adapter"):
        LPIPS(chain(**words).with_input_adapter(4), normalize=True)


def test_reductions(backend):
    x, y = pictures()
    each = LPIPS(chain(), heads(), reduction="none", backend=backend)(x, y)
    assert each.shape == (N,)
    torch.testing.assert_close(LPIPS(chain(), heads(), backend=backend)(x, y), each.mean())
    total = LPIPS(chain(), heads(), reduction="sum", backend=backend)(x, y)
    torch.testing.assert_close(total, each.sum())


@pytest.mark.parametrize("net", [chain, module])
def test_a_map(net):
    """Of each layer resized, in float64 as defined; its gradient too. In float16 the chain at unit
    scale loses none of it."""
    x, y = pictures(dtype=torch.float64)
    loss = LPIPS(net(), heads(), spatial=True)
    weight = torch.randn(N, 1, H, W, dtype=torch.float64)
    got = value_and_grad(lambda p: loss(p, y) * weight, x)
    want = value_and_grad(lambda p: by_definition(p, y, heads(), spatial=True) * weight, x)
    assert got[0].shape == (N, 1, H, W)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-12
    half = LPIPS(net(), heads(), spatial=True, compute_dtype=torch.float16)
    small = value_and_grad(lambda p: half(p, y.float()) * weight.float() * 1e-6, x.float())
    assert error(small[1], 1e-6 * want[1]) < 0.2
    assert torch.equal(loss.distance_map(x, y), loss(x, y))
    assert not loss.distance_map(x.requires_grad_(), y).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("net", [chain, module])
@pytest.mark.parametrize("spatial", [False, True])
def test_explain_counts_what_the_reference_keeps_with_heads(net, spatial, dtype):
    """`explain` runs it on meta tensors, where the heads are not."""
    loss = LPIPS(net(), heads(), spatial=spatial, backend="reference")
    x, y = pictures(dtype=dtype)
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    loss(x, y)  # what the network casts once is no part of a call
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss(x.requires_grad_(), y)
    for t in (x, y, *loss.net.cached_tensors()):
        kept.pop(t.untyped_storage().data_ptr(), None)
    assert loss.explain(x, y).bytes_saved == sum(kept.values())
    del value


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("net", [chain, module])
def test_on_meta_tensors_with_heads(net, spatial):
    x = torch.empty(N, 3, H, W, device="meta")
    loss = LPIPS(net(), heads(), spatial=spatial)
    shown, value = loss.distance_map(x, x), loss(x, x)
    assert shown.is_meta
    assert value.is_meta
    assert shown.shape == (N, 1, H, W)
    assert value.shape == ((N, 1, H, W) if spatial else ())


def test_who_makes_a_map():
    x, y = pictures()
    explained = LPIPS(chain(), spatial=True).explain(x, y)
    assert explained.backend == "fast"
    assert LPIPS(chain(), spatial=True).explain(x, y, architecture="sm_90").backend == "fast"
    explained = LPIPS(module(), spatial=True).explain(x, y)
    assert explained.backend == "reference"
    assert "from_module" in explained.reason
    with pytest.raises(BackendUnavailable, match=r"from_module.*backend='auto'"):
        LPIPS(module(), spatial=True, backend="fast")(x, y)
    with pytest.raises(ValueError, match=r"reduction.*spatial"):
        LPIPS(chain(), spatial=True, reduction="mean")


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("layer", [None, "relu2_1", "conv1_1"])
def test_a_map_of_strips_and_of_single_images(dtype, layer):
    """Of one layer or all, inside of a segment too; one image's gradient is 0, another's tiny."""
    x, y = pictures(dtype=dtype, n=3, h=65, w=54)
    words = {"heads": None if layer is None else {layer: None}, "spatial": True, "backend": "fast"}
    loss = LPIPS(chain(), **words)
    scale = torch.tensor([1.0, 0.0, 1e-6]).view(3, 1, 1, 1)
    weight = torch.rand(3, 1, 65, 54) * scale
    want = value_and_grad(lambda p: loss(p, y.float()) * weight, x.float())
    shown, whole = loss(x, y), loss.explain(x, y).workspace_bytes
    little = LPIPS(chain(), workspace_mb=0.4 * whole / 2**20, **words)
    nhwc = x.contiguous(memory_format=torch.channels_last)
    for given, made in ((x, little), (nhwc, loss), (x.mT.contiguous().mT, little)):
        got = value_and_grad(lambda p, made=made: made(p, y) * weight, given)
        assert error(made(given, y), shown) < (1e-5 if dtype == torch.float32 else 4e-3)
        for i in (0,) if dtype == torch.float16 else (0, 2):  # which does not hold its gradient
            assert error(got[1][i], want[1][i]) < (1e-4 if dtype == torch.float32 else 0.15)
        assert not got[1][1].any()


def test_a_map_in_float16_keeps_small_gradients():
    """At unit scale, pixel by pixel, also where the features' norm is small and seeds are large."""
    x, y = pictures()
    weight = 1e-7 * torch.rand(N, 1, H, W)
    loss = LPIPS(chain(), heads(False), spatial=True, backend="fast")
    half = LPIPS(chain(), heads(False), spatial=True, compute_dtype="float16", backend="fast")
    want, got = (value_and_grad(lambda p, f=f: f(p, y) * weight, x)[1] for f in (loss, half))
    assert error(got, want) < 0.05
    small = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU())
    small[0].weight.data = 1e-4 * torch.randn(
        4, 3, 3, 3, generator=torch.Generator().manual_seed(0)
    )
    net = LossNet.from_sequential(small)
    words = {"spatial": True, "backend": "fast"}
    want, got = (
        value_and_grad(lambda p, d=d: LPIPS(net, compute_dtype=d, **words)(p, y) * weight, x)[1]
        for d in ("float32", "float16")
    )
    assert got.isfinite().all()
    assert error(got, want) < 0.2


@pytest.mark.parametrize("spatial", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype, spatial):
    """A seed at each layer, the codes of pools and the masks of ReLUs: no features."""
    x, y = pictures(dtype=dtype)
    loss = LPIPS(chain(), heads(), spatial=spatial, backend="fast")
    kept = {}

    def pack(t):
        if t.data_ptr() not in (x.data_ptr(), y.data_ptr()):
            kept[t.data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss(x.requires_grad_(), y)
    sizes = [(H >> i) * (W >> i) for i in range(3)]
    seeds = x.element_size() * sum(c * size for c, size in zip(WIDTHS, sizes, strict=True))
    relus = ((WIDTHS[0], sizes[0]), *zip(WIDTHS, sizes, strict=True))
    masks = sum(math.ceil(c / 8) * size for c, size in relus)
    codes = sum(math.ceil(c / 2) * size for c, size in zip(WIDTHS[:2], sizes[1:], strict=True))
    assert sum(kept.values()) == N * (seeds + masks + codes)
    explained = loss.explain(x, y)
    assert explained.backend == "fast"
    assert explained.bytes_saved == N * (seeds + masks + codes)


# ------------------------------------------------------------------------------ as a module


def all_equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_holds_no_state(backend):
    loss = LPIPS(chain(), heads(), backend=backend)
    loss(*pictures())
    assert loss.state_dict() == {}
    assert [*loss.parameters(), *loss.buffers()] == []


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda loss: pickle.loads(pickle.dumps(loss)),
        lambda loss: loss.double().train(),
    ],
    ids=["deepcopy", "pickle", "cast"],
)
def test_copies_are_the_same(backend, copied):
    x, y = pictures()
    loss = LPIPS(chain(), heads(), eps=1e-3, backend=backend)
    before = value_and_grad(loss, x, y)
    other = copied(loss)
    assert other.fingerprint() == loss.fingerprint()
    assert repr(other) == repr(loss)
    assert all_equal(value_and_grad(other, x, y), before)


def test_changes_of_what_was_given_change_nothing(backend):
    given, x_y = heads(), pictures()
    loss = LPIPS(chain(), given, backend=backend)
    before = loss(*x_y)
    given["relu1_2"].zero_()
    loss.heads["relu1_2"].zero_()
    assert torch.equal(loss(*x_y), before)
    assert torch.equal(loss.heads["relu1_2"], heads()["relu1_2"].double())


@pytest.mark.parametrize("net", [chain, module])
def test_made_anywhere(backend, net):
    """Under inference mode, or where another device is the default one."""
    net, x_y = net(), pictures()
    backend = backend if net.is_chain else "auto"
    want = value_and_grad(LPIPS(net, heads(), backend=backend), *x_y)
    with torch.inference_mode():
        loss = LPIPS(net, {k: h.clone() for k, h in heads().items()}, backend=backend)
    assert all_equal(value_and_grad(loss, *x_y), want)
    numbers = {k: h.tolist() for k, h in heads().items()}
    with torch.device("meta"):
        loss, plain = (LPIPS(net, h, backend=backend) for h in (numbers, None))
    assert all_equal(value_and_grad(loss, *x_y), want)
    assert plain(*x_y) > 0


def test_what_makes_two_differ():
    base = LPIPS(chain(), heads())
    others = [LPIPS(chain(), heads(), eps=1e-8), LPIPS(chain(), heads(), eps_inside=True),
              LPIPS(chain(), heads(), normalize=True), LPIPS(chain(), heads(False)),
              LPIPS(chain()), LPIPS(chain(), {"relu1_2": heads()["relu1_2"]}),
              LPIPS(LossNet.from_sequential(trunk(1), mean=MEAN, std=STD), heads())]  # fmt: skip
    assert LPIPS(chain(), heads()).fingerprint() == base.fingerprint()
    assert len({x.fingerprint() for x in (base, *others)}) == len(others) + 1
    shown = {repr(x) for x in (base, *others)}
    assert len(shown) == len(others) + 1
    assert "spatial=True" in repr(LPIPS(chain(), spatial=True))
    assert "compute_dtype=torch.bfloat16" in repr(LPIPS(chain(), compute_dtype="bfloat16"))


def test_encoded_targets_serve_every_head_of_their_network(backend):
    """Features are before the heads: what changes these is all that they are held to."""
    x, y = pictures()
    stored = LPIPS(chain(), backend=backend).encode(y)
    loss = LPIPS(chain(), heads(), eps=1e-8, eps_inside=True, backend=backend)
    got, want = value_and_grad(loss, x, stored), value_and_grad(loss, x, y)
    assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-4
    with pytest.raises(ValueError, match="fingerprint"):
        LPIPS(chain(), heads(), normalize=True, backend=backend)(x, stored)


@pytest.mark.parametrize("spatial", [False, True])
def test_compiles(backend, spatial):
    torch._dynamo.reset()
    losses = [LPIPS(chain(), h, eps=e, spatial=spatial, backend=backend)
              for h, e in ((heads(), 1e-10), (heads(False), 1e-3), (None, 1e-10))]  # fmt: skip
    for loss in losses:
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for size in ((H, W), (H + 3, W)):
            x, y = pictures(h=size[0], w=size[1])
            got, want = value_and_grad(compiled, x, y), value_and_grad(loss, x, y)
            assert max(error(a, b) for a, b in zip(got, want, strict=True)) < 1e-6


# ----------------------------------------------------------------------------------------- its file


def test_a_file_holds_all_of_it(tmp_path, backend):
    x, y = pictures()
    for i, words in enumerate((
        {}, {"heads": None}, {"normalize": True, "eps": 1e-8, "eps_inside": True},
        {"reduction": "sum", "compute_dtype": torch.bfloat16},
    )):  # fmt: skip
        loss = LPIPS(chain(), **{"heads": heads(), "backend": backend, **words})
        loss.save(tmp_path / f"{i}.safetensors")
        again = LPIPS.load(tmp_path / f"{i}.safetensors", backend=backend)
        assert repr(again) == repr(loss)
        assert again.fingerprint() == loss.fingerprint()
        assert all_equal(value_and_grad(again, x, y), value_and_grad(loss, x, y))
    LPIPS(chain(), spatial=True).save(tmp_path / "map.safetensors")
    assert LPIPS.load(str(tmp_path / "map.safetensors"))(x, y).shape == (N, 1, H, W)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "lpips.safetensors"
    with pytest.raises(ValueError, match="save: a from_module network"):
        LPIPS(module(), heads()).save(path)
    LPIPS(chain(), heads()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"lpips\.safetensors.*truncated"):
        LPIPS.load(path)
    path.write_bytes(pickle.dumps({"heads": 1}))
    with pytest.raises(ValueError, match="not safetensors"):
        LPIPS.load(path)
    chain().save(path)
    with pytest.raises(ValueError, match="foreign"):
        LPIPS.load(path)
    LPIPS(chain()).save(path)
    with pytest.raises(ValueError, match="foreign"):
        LossNet.load(path)
    with pytest.raises(FileNotFoundError):
        LPIPS.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header, tensors: header.pop("net"), "structure is malformed"),
        (lambda header, tensors: header["net"]["layers"].pop(), "relu3_1"),
        (lambda header, tensors: header.update(heads="relu1_2"), "heads: got str"),
        (lambda header, tensors: header["heads"].append("relu2_2"), "missing"),
        (lambda header, tensors: header["heads"].append("relu1_2"), "heads: got .*each layer once"),
        (lambda header, tensors: header["settings"].update(normalize=True), "got 'normalize'"),
        (lambda header, tensors: header.pop("normalize"), "settings"),
        (lambda header, tensors: header["settings"].update(colour="red"), "colour"),
        (lambda header, tensors: header["settings"].update(eps=-1), "eps"),
        (lambda header, tensors: tensors.update({"head.relu1_2": torch.ones(5)}), "relu1_2"),
        (lambda header, tensors: tensors.update({"net.conv1_1": torch.ones(5)}), "conv1_1"),
        (lambda header, tensors: tensors.update(other=torch.ones(5)), "other"),
    ],
)
def test_a_file_that_was_changed(tmp_path, change, message):
    from gpl_fast.files import read_safetensors, write_safetensors

    path = tmp_path / "lpips.safetensors"
    LPIPS(chain(), heads()).save(path)
    header, tensors = read_safetensors(path, "gpl_fast.lpips", "LPIPS.save")
    change(header, tensors)
    write_safetensors(path, tensors, "gpl_fast.lpips", header)
    with pytest.raises(ValueError, match=rf"^{path}: .*{message}"):
        LPIPS.load(path)


# ------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        ({"net": trunk()}, TypeError, "expected a LossNet.*from_module"),
        ({"heads": [1.0]}, TypeError, "heads: got list, expected a dict"),
        ({"heads": {}}, ValueError, "heads: got no layer"),
        ({"heads": {"relu9_9": [1.0]}}, ValueError, "relu9_9.*relu1_2"),
        ({"heads": {"relu1_2": [1.0]}}, ValueError, r"relu1_2: got shape \(1,\), expected \(13,\)"),
        ({"heads": {"relu1_2": torch.ones(1, 13, 1, 1)}}, ValueError, r"weight\.flatten"),
        ({"heads": {"relu1_2": [math.nan] * 13}}, ValueError, "relu1_2"),
        ({"heads": {"relu1_2": torch.full((13,), math.inf)}}, ValueError, "not finite"),
        ({"heads": {"relu1_2": "1234567890123"}}, ValueError, "relu1_2"),
        ({"heads": {"relu1_2": torch.ones(13, device="meta")}}, ValueError, "meta"),
        ({"heads": {"relu1_2": [0.0] * 13}}, ValueError, "zeros alone"),
        ({"eps": 0}, ValueError, "eps: got 0.0, expected a number > 0"),
        ({"eps": "small"}, ValueError, "eps"),
        ({"eps_inside": 1}, ValueError, "eps_inside: got 1, expected True or False"),
        ({"normalize": "yes"}, ValueError, "normalize: got 'yes'"),
        ({"spatial": None}, ValueError, "spatial: got None"),
        ({"reduction": "max"}, ValueError, "reduction: got 'max'"),
        ({"backend": "slow"}, ValueError, "backend: got 'slow'"),
    ],
)  # fmt: skip
def test_what_it_refuses(words, kind, message):
    with pytest.raises(kind, match=message):
        LPIPS(**{"net": chain(), **words})


def test_layers_and_channels():
    assert list(LPIPS(chain()).heads) == list(LAYERS)
    assert list(LPIPS(module()).heads) == list(LAYERS)
    assert [len(h) for h in LPIPS(module()).heads.values()] == list(WIDTHS)
    only = LPIPS(chain(), {"relu2_1": None, "conv1_1": [1, *12 * [0]]})
    assert list(only.heads) == ["relu2_1", "conv1_1"]
    with pytest.raises(ValueError, match="without ReLU"):
        LPIPS(LossNet.from_sequential(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1))))
    with pytest.raises(ValueError, match="relu2_1: got shape"):
        LPIPS(module(), {"relu2_1": [1.0] * 6})


def test_what_is_no_peer():
    for given in (trunk(), chain(), gpl_fast.GenericPerceptualLoss(3), None):
        with pytest.raises(TypeError, match=r"LPIPS\.from_module: got .* expected an lpips\.LPIPS"):
            LPIPS.from_module(given)


def test_wrong_inputs(backend):
    loss = LPIPS(chain(), backend=backend)
    x, y = pictures()
    with pytest.raises(ValueError, match=r"expected \(N, 3, H, W\)"):
        loss(x[:, :2], y)
    with pytest.raises(ValueError, match="images, expected 2"):
        loss(x, y[:1])
    with pytest.raises(TypeError, match=r"prediction: got torch\.uint8"):
        loss((x * 255).byte(), y)
    with pytest.raises(ValueError, match="at least 4 x 4"):
        loss(x[:, :, :3], y[:, :, :3])
