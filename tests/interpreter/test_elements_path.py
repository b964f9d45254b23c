"""Losses of labels of single elements by Triton's kernels, interpreted."""

from __future__ import annotations

import pytest
import torch
from elements import CHANNELS, DTYPES, against_float64
from policies import decided
from program_order import ORDERS, program_order
from test_path import wide_tile

from gpl_fast import SegmentationLoss

pytestmark = pytest.mark.usefixtures("one_thread", "triton_path")


@pytest.fixture
def triton_path(decide, monkeypatch):
    """CPU tensors take the path of CUDA tensors; float32 is float32."""
    decide(forward="triton", backward="triton", arch=80, tiles=wide_tile)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("kind", ["labels", "dense", "resized", "topk", "features"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("mode", CHANNELS)
def test_value_and_gradient(mode, backend, dtype, kind):
    seed = list(DTYPES).index(dtype)
    with decided(rows=4 if seed else None):
        against_float64(mode, kind, DTYPES[dtype], seed, size=(2, 11, 14))


def test_the_order_of_programs_does_not_change_a_bit():
    loss = SegmentationLoss(3, mode="multilabel", net="1", widths=(5,), backend="fast")
    x, y = torch.randn(2, 3, 7, 12), torch.randint(2, (2, 3, 7, 12))
    y[:, 1, 3:5] = 255
    found = []
    for order in ORDERS:
        leaf = x.clone().requires_grad_()
        with program_order(order):
            value = loss(leaf, y)
            found.append((value.detach(), *torch.autograd.grad(value, leaf)))
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, found[0], strict=True))
