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
