"""`LPIPS.from_module` against the packages: the same value and gradient."""

from __future__ import annotations

import copy
import functools
import statistics
import warnings

import lpips
import pytest
import torch
import torch.nn.functional as F
from cases import value_and_grad
from torch import nn
from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

from gpl_fast import LPIPS, BackendUnavailable
from gpl_fast.lpips_peers import known_peer

N, H, W = 2, 72, 80
NETS = ("vgg", "alex", "squeeze")


@functools.cache
def made(net, **words):
    """Not to be changed: `peer` gives copies."""
    torch.manual_seed(5)
    if words.pop("metric", False):
        return LearnedPerceptualImagePatchSimilarity(net, **words)
    return lpips.LPIPS(net=net, verbose=False, **words)


def peer(net="vgg", **words):
    return copy.deepcopy(made(net, **words))


def pictures(apart, dtype=torch.float32, n=N):
    """In [-1, 1]: the second is the first and noise, or of None independent of it."""
    x = torch.rand(n, 3, H, W) * 2 - 1
    y = torch.rand(n, 3, H, W) * 2 - 1 if apart is None else x + apart * torch.randn(n, 3, H, W)
    return x.to(dtype), y.clamp(-1, 1).to(dtype)


def close(got, want, tolerance):
    torch.testing.assert_close(got, want.reshape(got.shape), rtol=tolerance, atol=0)


def angle(a, b):
    """1 - cosine of two gradients."""
    return 1 - float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


# --------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("headed", [True, False], ids=["heads", "no heads"])
@pytest.mark.parametrize("net", NETS, ids=[f"lpips-reference-float64-dense-{net}" for net in NETS])
def test_float64_equals_lpips(net, headed):
    theirs = peer(net, lpips=headed)
    x, y = pictures(0.3, torch.float64)
    loss = LPIPS.from_module(theirs, reduction="none")
    want = value_and_grad(theirs.double(), x, y)
    got = value_and_grad(loss, x, y)
    assert got[0].shape == (N,)
    close(got[0], want[0], 1e-10)
    assert (got[1] - want[1]).norm() <= 1e-10 * want[1].norm()


@pytest.mark.parametrize(
    "words",
    [
        {"pretrained": False},
        {"version": "0.0"},
        {"spatial": True},
        {"spatial": True, "lpips": False},
        {"use_dropout": False},
        {"eval_mode": False},
        {"pnet_tune": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_float64_equals_lpips_of_other_settings(net, words):
    """Untrained heads are negative in part; in training mode the peer drops out at random."""
    theirs = peer(net, **words)
    x, y = pictures(0.3, torch.float64)
    loss = LPIPS.from_module(theirs)
    want = value_and_grad(theirs.double().eval(), x, y)
    got = value_and_grad(loss, x, y)
    spatial = words.get("spatial", False)
    assert got[0].shape == ((N, 1, H, W) if spatial else ())
    close(got[0], want[0] if spatial else want[0].mean(), 1e-10)
    scale = 1 if spatial else N
    assert (scale * got[1] - want[1]).norm() <= 1e-10 * want[1].norm()


def test_float64_equals_lpips_of_inputs_in_0_1():
    theirs = peer()
    x, y = pictures(0.3, torch.float64)
    x, y = (x + 1) / 2, (y + 1) / 2
    want = value_and_grad(lambda p: theirs.double()(p, y, normalize=True), x)
    got = value_and_grad(LPIPS.from_module(theirs, normalize=True, reduction="sum"), x, y)
    close(got[0], want[0].sum(), 1e-10)
    assert (got[1] - want[1]).norm() <= 1e-10 * want[1].norm()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", None])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("net", NETS)
def test_float64_equals_torchmetrics(net, normalize, reduction):
    theirs = peer(net, metric=True, normalize=normalize, reduction=reduction)
    x, y = pictures(0.3, torch.float64)
    if normalize:
        x, y = (x + 1) / 2, (y + 1) / 2
    loss = LPIPS.from_module(theirs)
    theirs.net.double()
    want = value_and_grad(theirs, x, y)
    got = value_and_grad(loss, x, y)
    assert got[0].shape == want[0].shape
    close(got[0], want[0], 1e-10)
    assert (got[1] - want[1]).norm() <= 1e-10 * want[1].norm()


# ------------------------------------------------------------------------------------ the fast path


# Medians of them: a winner of a max pool that rounding decides moves a draw's gradient at once.
DRAWS = 3


@pytest.mark.parametrize("metric", [False, True], ids=["lpips", "torchmetrics"])
@pytest.mark.parametrize("apart", [0.01, 0.1, 0.5, None], ids="apart {}".format)
def test_float32_errs_at_most_twice_what_the_peer_does(apart, metric):
    theirs = peer(metric=metric, **({"reduction": "sum"} if metric else {}))
    pairs = [pictures(apart) for _ in range(DRAWS)]
    loss = LPIPS.from_module(theirs, backend="fast", reduction="sum")
    got = [value_and_grad(loss, *pair) for pair in pairs]
    single = [value_and_grad(theirs, *pair) for pair in pairs]
    (theirs.net if metric else theirs).double()
    truth = [value_and_grad(theirs, x.double(), y.double()) for x, y in pairs]

    def errors(found):
        """Of the value, relative, and 1 - cosine of the gradient."""
        steps = [*zip(found, truth, strict=True)]
        values = [abs(float(v.sum() / t.sum()) - 1) for (v, _), (t, _) in steps]
        angles = [angle(g, t) for (_, g), (_, t) in steps]
        return statistics.median(values), statistics.median(angles)

    for ours, plain, least in zip(errors(got), errors(single), (1e-6, 1e-5), strict=True):
        assert ours <= 2 * plain + least


@pytest.mark.parametrize("headed", [True, False], ids=["heads", "no heads"])
def test_float32_maps_err_at_most_twice_what_the_peers_do(headed):
    theirs = peer(spatial=True, lpips=headed)
    drawn = [(*pictures(0.3), torch.randn(N, 1, H, W)) for _ in range(DRAWS)]
    loss = LPIPS.from_module(theirs, backend="fast")

    def steps(made, dtype=torch.float32):
        return [
            value_and_grad(lambda p, y=y, m=m: made(p, y.to(dtype)) * m, x.to(dtype))
            for x, y, m in drawn
        ]

    got, single = steps(loss), steps(theirs)
    truth = steps(theirs.double(), torch.float64)

    def errors(found):
        """Of the map and the gradient, relative."""
        each = [
            [float((t - true).norm() / true.norm()) for t, true in zip(*step, strict=True)]
            for step in zip(found, truth, strict=True)
        ]
        return [statistics.median(of_draws) for of_draws in zip(*each, strict=True)]

    for ours, plain in zip(errors(got), errors(single), strict=True):
        assert ours <= 2 * plain + 1e-6


def test_float32_of_independent_images():
    theirs = peer()
    x, y = pictures(None)
    got = value_and_grad(LPIPS.from_module(theirs, backend="fast", reduction="none"), x, y)
    want = value_and_grad(theirs, x, y)
    close(got[0], want[0], 2e-6)
    assert angle(got[1], want[1]) < 1e-6


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_identical_images(net, value):
    """Of one colour, also where no layer has features: 0 and a gradient of 0, as the peer's."""
    theirs = peer(net)
    x = torch.full((1, 3, H, W), value)
    for dead in (False, True):
        for layer in theirs.net.modules():
            if dead and isinstance(layer, nn.Conv2d):
                layer.bias.data.fill_(-9.0)
        for loss in (theirs, LPIPS.from_module(theirs)):
            got, grad = value_and_grad(loss, x, x.clone())
            assert got == 0
            assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("net", NETS)
def test_who_runs_it(net):
    loss = LPIPS.from_module(peer(net))
    x, y = pictures(None)
    explained = loss.explain(x, y)
    if net == "vgg":
        assert explained.backend == "fast"
        assert explained.bytes_saved / x[:, 0].numel() <= 2439 / 4  # lpips: 2,439 bytes a pixel
        half = LPIPS.from_module(peer(net), compute_dtype="bfloat16")
        assert half.explain(x, y).bytes_saved / x[:, 0].numel() <= 2439 / 8
        return
    assert explained.backend == "reference"
    assert "from_module" in explained.reason
    with pytest.raises(BackendUnavailable, match="from_module"):
        LPIPS.from_module(peer(net), backend="fast")(x, y)


# ----------------------------------------------------------------------------------- what is copied


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_of_a_peer_in_any_dtype(net, dtype):
    theirs = peer(net).to(dtype)
    x, y = pictures(0.5, torch.float64)
    loss = LPIPS.from_module(theirs, reduction="none")
    close(loss(x, y), theirs.double()(x, y).detach(), 1e-10)


def test_it_is_a_copy_without_hooks():
    theirs, called = peer(), []
    for module in theirs.modules():
        module.register_forward_hook(lambda *_: called.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the copy has none of them
        loss = LPIPS.from_module(theirs)
    x, y = pictures(None)
    before = loss(x, y)
    assert not called
    for p in theirs.parameters():
        p.data.zero_()
    assert torch.equal(loss(x, y), before)
    assert [*loss.parameters(), *loss.buffers()] == []


def test_a_metric_that_was_used():
    """What it has counted so far, with its graph, stays behind."""
    theirs = peer(metric=True)
    x, y = pictures(None)
    theirs.update(x.requires_grad_(), y)
    close(LPIPS.from_module(theirs)(x, y), theirs.compute(), 2e-6)


def test_saves_and_loads(tmp_path):
    loss = LPIPS.from_module(peer(), normalize=True, reduction="none")
    loss.save(tmp_path / "vgg.safetensors")
    again = LPIPS.load(tmp_path / "vgg.safetensors")
    assert repr(again) == repr(loss)
    x, y = pictures(None)
    assert torch.equal(again(x, y), loss(x, y))


# ---------------------------------------------------------------------------------- what is refused


class Other(lpips.LPIPS):
    def forward(self, *images, **words):
        return super().forward(*images, **words).sqrt()


class Same(lpips.LPIPS):
    """Adds what changes no value."""

    name = "same"


def test_models_that_compute_something_else():
    other = Other(verbose=False)
    for given in (other, nn.DataParallel(peer()), peer().net):
        with pytest.raises(TypeError, match=r"LPIPS\.from_module: got .*expected an lpips\.LPIPS"):
            LPIPS.from_module(given)
    theirs = peer()
    theirs.forward = lambda x, y: x.sum()
    with pytest.raises(TypeError, match="as they come"):
        LPIPS.from_module(theirs)
    assert known_peer(Same(verbose=False)).words == {"eps": 1e-10, "eps_inside": False}


def test_parts_that_are_not_the_packages():
    for change in (
        lambda p: setattr(p, "net", nn.Sequential(nn.Conv2d(3, 4, 3))),
        lambda p: setattr(p, "scaling_layer", nn.Identity()),
        lambda p: p.lins.__setitem__(2, nn.Conv2d(256, 1, 1)),
    ):
        theirs = peer()
        change(theirs)
        with pytest.raises(ValueError, match=r"from_module: (net|scaling_layer|lins\.2): got"):
            LPIPS.from_module(theirs)
    theirs = peer(metric=True)
    theirs.net.resize = 64
    with pytest.raises(ValueError, match=r"resize=64.*F\.interpolate"):
        LPIPS.from_module(theirs)
