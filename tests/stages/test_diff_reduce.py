"""Σ δ² of each image."""

from __future__ import annotations

import pytest
import torch
from definitions import DTYPES, FLOAT

pytestmark = pytest.mark.needs("diff_reduce_fwd")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 9001), (1, 3, 5, 64)])
def test_against_float64(stages, shape, dtype):
    delta = torch.randn(*shape).to(dtype)
    truth = delta.double().square().flatten(1).sum(1)
    torch.testing.assert_close(stages.diff_reduce_fwd(delta), truth, rtol=1e-6, atol=0)


def test_orders_agree_bit_for_bit(stages):
    delta, found = torch.randn(3, 40, 64, 40), []
    for order in stages.orders.values():
        with order():
            found.append(stages.diff_reduce_fwd(delta))
    assert all(torch.equal(f, found[0]) for f in found)


def test_no_images(stages):
    assert stages.diff_reduce_fwd(torch.empty(0, 5, 7, 8, dtype=FLOAT)).shape == (0,)


# ------------------------------------------------------------------- other criteria, weights, seeds

FORMS = {"l1": (1, False), "weights": (0, True), "l1, weights": (1, True), "seed alone": (0, False)}


def by_definition(delta, criterion, weight):
    """Sums and seeds in float64."""
    d = delta.double()
    w = torch.ones(d.shape[-1]) if weight is None else weight
    each = w.double() * (d.abs() if criterion else d.square())
    return each.flatten(1).sum(1), w.double() * (d.sign() if criterion else d)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 1), (2, 9001), (2, 7, 5, 64), (1, 33, 40, 21)])
@pytest.mark.parametrize("form", FORMS)
def test_seeds_against_float64(stages, form, shape, dtype):
    criterion, weighted = FORMS[form]
    delta = torch.randn(*shape).to(dtype)
    delta.flatten()[::5] = 0
    weight = torch.rand(shape[-1]) if weighted else None
    seed = torch.full_like(delta, torch.nan)
    sums, want = by_definition(delta, criterion, weight)
    got = stages.diff_reduce_fwd(delta, criterion=criterion, weight=weight, seed=seed)
    torch.testing.assert_close(got, sums, rtol=1e-6, atol=0)
    torch.testing.assert_close(seed, want.to(dtype))
    assert torch.equal(seed == 0, want == 0)
    alone = stages.diff_reduce_fwd(delta, criterion=criterion, weight=weight)
    torch.testing.assert_close(alone, got, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_a_seed_may_be_the_difference_itself(stages, form):
    criterion, weighted = FORMS[form]
    delta, weight = torch.randn(2, 9, 11, 20), torch.rand(20) if weighted else None
    seed, given = torch.empty_like(delta), {"criterion": criterion, "weight": weight}
    apart = stages.diff_reduce_fwd(delta, **given, seed=seed)
    assert torch.equal(stages.diff_reduce_fwd(delta, **given, seed=delta), apart)
    assert torch.equal(delta, seed)


@pytest.mark.parametrize("form", FORMS)
def test_orders_of_seeds_agree_bit_for_bit(stages, form):
    criterion, weighted = FORMS[form]
    delta, found = torch.randn(3, 40, 20, 40), []
    given = {"criterion": criterion, "weight": torch.rand(40) if weighted else None}
    for order in stages.orders.values():
        seed = torch.empty_like(delta)
        with order():
            found.append((stages.diff_reduce_fwd(delta, **given, seed=seed), seed))
    assert all(torch.equal(a, b) for f in found for a, b in zip(f, found[0], strict=True))


def test_nan_stays_nan(stages):
    delta, seed = torch.randn(1, 2, 2, 20), torch.empty(1, 2, 2, 20)
    delta[0, 1, 0, 3] = torch.nan
    assert stages.diff_reduce_fwd(delta, criterion=1, seed=seed).isnan()
    assert torch.equal(seed.isnan(), delta.isnan())
