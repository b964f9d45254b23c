"""The difference of features over their norms, its sum and its gradient, against float64."""

from __future__ import annotations

import pytest
import torch
from definitions import DTYPES, FLOAT, HALF

from gpl_fast import reference
from gpl_fast.distance import Distance

pytestmark = pytest.mark.needs("unit_diff_fwd")

EPS = ((1e-10, False), (1e-8, True), (0.3, False), (0.3, True))
SHAPES = ((2, 3, 5, 64), (1, 7, 9, 21), (3, 1, 1, 1), (1, 2, 3, 200))


def branches(shape, dtype, near=1.0):
    """(the prediction's and the target's features, both in float64)."""
    y = torch.randn(shape).to(dtype)
    t = y + (near * torch.randn(shape)).to(dtype)
    return y, t, y.double(), t.double()


def by_definition(p, t, distance, weight):
    """Sums over an image and seeds, in float64: autograd's gradient without the 2 of a square."""
    leaf = p.permute(0, 3, 1, 2).clone().requires_grad_()
    w = None if weight is None else weight.double()
    mean = reference.feature_distance(leaf, t.permute(0, 3, 1, 2), distance, w)
    sums = mean * leaf[0].numel()
    (grad,) = torch.autograd.grad(sums.sum(), leaf)
    return sums.detach(), grad.permute(0, 2, 3, 1) / distance.slope


def run(stages, y, t, distance, weight, seed, **more):
    words = {"criterion": int(distance.criterion == "l1"), "eps": distance.eps}
    words |= {"eps_inside": distance.eps_inside, "weight": weight, "seed": seed, **more}
    return stages.unit_diff_fwd(y, target=t, **words)


def close(got, want, dtype, rtol=2e-5):
    eps = torch.finfo(dtype).eps
    error = (got.double() - want).norm() / want.norm().clamp(min=1e-300)
    assert error <= rtol + eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("criterion", ["l2", "l1"])
@pytest.mark.parametrize("eps", EPS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(stages, shape, eps, criterion, weighted, dtype):
    distance = Distance(criterion, True, *eps)
    y, target, p, t = branches(shape, dtype)
    target = target.float()  # of any of the dtypes
    weight = torch.rand(shape[-1]) if weighted else None
    seed = torch.full(shape, torch.nan, dtype=FLOAT if dtype == HALF else dtype)
    want = by_definition(p, t, distance, weight)
    sums = run(stages, y, target, distance, weight, seed)
    if shape[-1] == 1 and eps[0] < 0.1:  # n(φ) is the sign: nothing is left of the gradient
        torch.testing.assert_close(sums, want[0], rtol=1e-5, atol=1e-6)
        assert seed.isfinite().all()
    else:
        close(sums, want[0], FLOAT)
        close(seed, want[1], seed.dtype)
    alone = run(stages, y, target, distance, weight, None)
    assert torch.equal(alone, sums)


@pytest.mark.parametrize("near", [1e-2, 1e-5])
def test_near_equal_features_keep_their_digits(stages, near):
    """Units that were subtracted would be left with 7 digits less those that agree."""
    distance = Distance("l2", True)
    y, target, p, t = branches((2, 3, 4, 32), FLOAT, near)
    seed = torch.empty(y.shape)
    sums = run(stages, y, target, distance, None, seed)
    want = by_definition(p, t, distance, None)
    close(sums, want[0], FLOAT)
    close(seed, want[1], FLOAT)


def test_maps_of_taller_images_and_narrow_seeds(stages):
    """Rows of each are contiguous in an image, images are apart."""
    tall = [torch.randn(2, 9, 5, 24) for _ in range(3)]
    y, target, seed = (m[:, i : i + 4] for i, m in enumerate(tall))
    before, distance = tall[2].clone(), Distance("l1", True)
    sums = run(stages, y, target, distance, torch.rand(24), seed)
    own = torch.empty(2, 4, 5, 24)
    again = run(stages, y.contiguous(), target.contiguous(), distance, None, own)
    assert torch.equal(tall[2][:, :2], before[:, :2])
    assert torch.equal(tall[2][:, 6:], before[:, 6:])
    plain = run(stages, y, target, distance, None, seed)
    assert torch.equal(plain, again)
    assert torch.equal(seed, own)
    assert (sums < plain).all()


@pytest.mark.parametrize("eps", EPS, ids=str)
@pytest.mark.parametrize("criterion", ["l2", "l1"])
def test_where_features_are_0(stages, criterion, eps):
    """In one branch or in both; what is equal costs nothing."""
    distance = Distance(criterion, True, *eps)
    p, t = torch.randn(2, 1, 4, 3, 20)
    p[0, 0], t[0, 1], p[0, 2], t[0, 2], t[0, 3] = 0, 0, 0, 0, p[0, 3]
    seed = torch.full(p.shape, torch.nan)
    sums = run(stages, p, t, distance, None, seed)
    want = by_definition(p.double(), t.double(), distance, None)
    close(sums, want[0], FLOAT)
    assert seed.isfinite().all()
    torch.testing.assert_close(seed[:, 1].double(), want[1][:, 1], rtol=1e-5, atol=1e-6)
    assert not seed[0, 2].any()
    assert not seed[0, 3].any()
    if not eps[1]:
        assert not seed[0, 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("criterion", ["l2", "l1"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_distances_of_pixels(stages, shape, weighted, criterion, dtype):
    """Rows of taller maps; they add up to the sums, and change no bit of these or of seeds."""
    distance = Distance(criterion, True)
    y, target, p, t = branches(shape, dtype)
    n, h, w, c = shape
    weight = torch.randn(c) if weighted else None
    seeds = [torch.full(shape, torch.nan) for _ in range(2)]
    tall = torch.full((n, h + 5, w), torch.nan)
    sums = run(stages, y, target, distance, weight, seeds[0], distances=tall[:, 2 : 2 + h])
    leaf = p.permute(0, 3, 1, 2)
    each = reference.weighted_difference(
        leaf, t.permute(0, 3, 1, 2), distance, None if weight is None else weight.double()
    ).sum(dim=1)
    torch.testing.assert_close(tall[:, 2 : 2 + h].double(), each, rtol=1e-4, atol=1e-6)
    assert tall[:, :2].isnan().all()
    assert tall[:, 2 + h :].isnan().all()
    torch.testing.assert_close(
        tall[:, 2 : 2 + h].double().sum(dim=(1, 2)), sums, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(run(stages, y, target, distance, weight, seeds[1]), sums)
    assert torch.equal(*seeds)


def test_orders_agree_bit_for_bit(stages):
    distance, found = Distance("l2", True), []
    y, target, *_ = branches((3, 20, 23, 40), FLOAT)
    weight = torch.rand(40)
    for order in stages.orders.values():
        seed, pixels = torch.empty_like(y), torch.empty(y.shape[:3])
        with order():
            sums = run(stages, y, target, distance, weight, seed, distances=pixels)
        found.append((sums, seed, pixels))
    assert all(torch.equal(a, b) for f in found for a, b in zip(f, found[0], strict=True))


def test_no_images(stages):
    y = torch.empty(0, 5, 7, 8)
    assert run(stages, y, y, Distance("l2", True), None, y.clone()).shape == (0,)
