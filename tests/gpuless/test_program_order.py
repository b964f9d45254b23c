"""The programs of a launch run in any order, or only some of them."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from program_order import ORDERS, backward, forward, program_order


@triton.jit
def _turn_kernel(turn_ptr, z_ptr, W: tl.constexpr):
    at = tl.program_id(0) * W + tl.program_id(1)
    tl.store(z_ptr + at, tl.atomic_add(turn_ptr, 1))


def turns():
    """When each program of a 3 x 4 grid ran; -1 = not at all."""
    turn, z = torch.zeros(1, dtype=torch.int32), torch.full((3, 4), -1, dtype=torch.int32)
    _turn_kernel[(3, 4)](turn, z, 4)
    return z.flatten().tolist()


def test_orders():
    ran = {}
    for order in ORDERS:
        with program_order(order):
            ran[order] = turns()
    assert ran[forward] == list(range(12))
    assert ran[backward] == list(range(12))[::-1]
    assert all(sorted(ran[order]) == list(range(12)) for order in ORDERS)
    assert len({tuple(order) for order in ran.values()}) == len(ORDERS)
    assert turns() == ran[forward]


def test_the_last_program_only():
    with program_order(lambda programs: programs[-1:]):
        assert turns() == [-1] * 11 + [0]


def test_the_order_is_restored_after_an_error():
    with pytest.raises(ZeroDivisionError), program_order(backward):
        raise ZeroDivisionError
    assert turns() == list(range(12))


def test_a_grid_may_be_a_function_of_the_arguments():
    turn, z = torch.zeros(1, dtype=torch.int32), torch.empty(2, 4, dtype=torch.int32)
    _turn_kernel[lambda meta: (8 // meta["W"], meta["W"])](turn, z, W=4)
    assert z.flatten().tolist() == list(range(8))


def test_an_empty_grid_runs_nothing():
    turn, z = torch.zeros(1, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    _turn_kernel[(0, 4)](turn, z, 4)
    assert turn.item() == 0


@triton.jit
def _infinity_kernel(z_ptr):
    tl.store(z_ptr, tl.exp(tl.load(z_ptr)))


@pytest.mark.filterwarnings("error")
def test_infinities_are_silent():
    z = torch.full((1,), 1e3)
    _infinity_kernel[(1,)](z)
    assert z.isinf()
