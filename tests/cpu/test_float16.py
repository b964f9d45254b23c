"""float16's backward chain: large features scale it down, by powers of two, and nothing else does.

Without activation and biases a loss is homogeneous: inputs times s = 2^k have float16's features
times s to the bit, and the gradient of a feature distance times s, of a style distance times s^3.
"""

from __future__ import annotations

import pytest
import torch
from cases import NARROW, error, make_target, value_and_grad

from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss
from gpl_fast.fast.seeds import Seeds
from gpl_fast.ops import load

if (reason := load()) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

HALF, MOST = torch.float16, torch.finfo(torch.float16).max
LAST = {"pool2": 1.0}
# Feature and style taps, and the power of s that their gradient has.
TAPS = {
    "last": (LAST, {}, 1),
    "levels": ({"pool1": 1.0, "pool2": 0.5}, {}, 1),
    "inside": ({"conv1_2": 1.0, "relu1_2": 0.5, "pool2": 1.0}, {}, 1),
    "style": ({}, {"relu1_2": 2.0, "pool1": 3.0}, 3),
    "style at the end": ({}, {"pool2": 1.0}, 3),
    "style inside": ({}, {"relu1_1": 1.0, "conv2_1": 0.25}, 3),
}
NET = LossNet.vgg(3, (2, 1), (16, 24))


def loss_of(taps, **options):
    features, styles, _ = TAPS[taps]
    return PerceptualLoss(NET, features, styles, compute_dtype=HALF, backend="fast", **options)


def inputs(n=2):
    """Prediction and target, float16's own numbers."""
    return torch.randn(2, n, 3, 40, 36).half().float()


def largest_power(*maps):
    """The largest s = 2^k with which float16 holds every feature."""
    most = 1.0
    for x in maps:
        for e in NET.features(x, [layer.name for layer in NET.layers]).values():
            most = max(most, float(e.abs().max()))
    return 2.0 ** int(torch.tensor(MOST / 4 / most).log2())


@pytest.fixture
def as_it_was(monkeypatch):
    """Function: a value and gradient of a chain that is not scaled."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(Seeds, "_fit_float16", lambda self: None)
            return value_and_grad(*arguments)

    return run


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("taps", TAPS)
def test_large_features_have_their_gradient(taps, rows, decide, as_it_was):
    decide(rows=rows)
    pred, target = inputs()
    s = largest_power(pred, target)
    assert s >= 2**10
    loss, power = loss_of(taps), TAPS[taps][2]
    _, unit = value_and_grad(loss, pred, target)
    _, grad = value_and_grad(loss, s * pred, s * target)
    assert grad.isfinite().all()
    assert error(grad.double() / s**power, unit) < 1e-3
    exact = PerceptualLoss(NET, *TAPS[taps][:2], backend="reference")
    _, truth = value_and_grad(exact, pred.double(), target.double())
    _, large = value_and_grad(exact, s * pred.double(), s * target.double())
    assert error(grad, large) < error(unit, truth) + 1e-3  # as near as that of ordinary features
    if power == 3:  # where no scaling of the loss helps
        assert not as_it_was(loss, s * pred, s * target)[1].isfinite().all()


@pytest.mark.parametrize("s", [1.0, 2.0**3, 2.0**6, 2.0**9])
def test_every_size_of_style_features(s):
    pred, target = inputs()
    loss = loss_of("style")
    _, unit = value_and_grad(loss, pred, target)
    _, grad = value_and_grad(loss, s * pred, s * target)
    assert error(grad.double() / s**3, unit) < 1e-3


@pytest.mark.parametrize("taps", ["last", "style"])
def test_an_image_of_large_features_leaves_the_others_alone(taps):
    pred, target = inputs(3)
    factor = torch.tensor([1.0, largest_power(pred, target), 1.0]).view(3, 1, 1, 1)
    loss = loss_of(taps, reduction="none")
    _, unit = value_and_grad(loss, pred, target)
    _, grad = value_and_grad(loss, factor * pred, factor * target)
    assert torch.equal(grad[::2], unit[::2])
    assert error(grad[1].double() / float(factor[1]) ** TAPS[taps][2], unit[1]) < 1e-3


@pytest.mark.parametrize("taps", TAPS)
def test_a_float16_gradient_is_finite_where_float16_holds_it(taps):
    """The loss is scaled as by a GradScaler; the chain above it is not the loss' scale's."""
    pred, target = inputs()
    s, loss = largest_power(pred, target) / 4, loss_of(taps)
    _, unit = value_and_grad(loss, pred, target)
    scale = MOST / 4 / float(unit.abs().max()) / s ** TAPS[taps][2]
    large = (s * pred).half(), (s * target).half()
    _, grad = value_and_grad(lambda x, t: loss(x, t).double() * scale, *large)
    assert grad.dtype == HALF
    assert grad.isfinite().all()
    assert error(grad, unit.double() * (scale * s ** TAPS[taps][2])) < 2e-3


ORDINARY = {
    "dense": (lambda **o: GenericPerceptualLoss(5, "2,1", widths=NARROW, **o), "dense"),
    "levels": (
        lambda **o: GenericPerceptualLoss(5, "1,1", widths=NARROW, level_weights=(0.5, 2), **o),
        "dense"),
    "labels": (lambda **o: GenericPerceptualLoss(5, "2,1", widths=NARROW, **o), "labels"),
    "no activation": (
        lambda **o: GenericPerceptualLoss(5, "1,1", widths=NARROW, activation="none", **o),
        "dense"),
    "features": (lambda **o: GenericPerceptualLoss(5, "1,1", widths=NARROW, **o), "features"),
    "total": (lambda **o: SegmentationLoss(5, net="1,1", widths=NARROW, **o), "labels"),
    "style": (
        lambda **o: PerceptualLoss(
            LossNet.vgg(5, (2, 1), NARROW), LAST, {"relu1_2": 1.0}, activation="sigmoid", **o),
        "dense"),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_features_change_no_bit(name, as_it_was):
    make, kind = ORDINARY[name]
    shape = (2, 5, 24, 22)
    loss = make(backend="fast", compute_dtype=HALF)
    pred, target = 2 * torch.randn(shape), make_target(kind, shape, loss)
    got, was = value_and_grad(loss, pred, target), as_it_was(loss, pred, target)
    assert got[1].any()
    assert all(map(torch.equal, got, was))


@pytest.mark.parametrize("taps", ["last", "style"])
def test_nothing_to_scale(taps):
    """Equal maps, no images, and gradients that are 0 or come from infinite features."""
    loss = loss_of(taps, reduction="none")
    pred, target = inputs(3)
    _, grad = value_and_grad(loss, pred, pred)
    assert not grad.any()
    assert value_and_grad(loss, pred[:0], target[:0])[1].shape == (0, 3, 40, 36)
    factor = torch.tensor([0.0, -1.0, 1.0])
    _, unit = value_and_grad(loss, pred, target)
    _, grad = value_and_grad(lambda x: loss(x, target) * factor, pred)
    assert not grad[0].any()
    assert torch.equal(grad[1], -unit[1])
    pred = torch.cat([pred[:1], torch.full_like(pred[:1], MOST), pred[2:]])
    _, grad = value_and_grad(loss, pred, target)
    assert torch.equal(grad[::2], unit[::2])
