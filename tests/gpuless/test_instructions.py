"""The counter, on machine code whose count is known."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import compile_for, disassembled, meta
from instructions import issued, loops, per_element

NESTED = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe20000000f00 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;       /* 0x0000000000000000 */
        /*0020*/                   LDG.E R3, desc[UR4][R4.64] ;  /* 0x0000000000000000 */
        /*0030*/                   FADD R5, R3, R5 ;             /* 0x0000000000000000 */
        /*0040*/              @!P0 BRA 0x20 ;                    /* 0x0000000000000000 */
        /*0050*/               @P2 BRA 0x70 ;                    /* 0x0000000000000000 */
        /*0060*/                   FMUL R5, R5, R5 ;             /* 0x0000000000000000 */
        /*0070*/               @P1 BRA `(.L_x_1) 0x10 ;          /* 0x0000000000000000 */
        /*0080*/                   EXIT ;                        /* 0x0000000000000000 */
        /*0090*/                   BRA 0x90;                     /* 0x0000000000000000 */
        /*00a0*/                   NOP;                          /* 0x0000000000000000 */
"""


def test_loops_in_loops():
    assert loops(NESTED) == [(0x10, 0x70), (0x20, 0x40)]
    # the entry and the end; four in the outer loop; three in the inner one
    assert issued(NESTED, (5, 7)) == 2 + 5 * (4 + 7 * 3)
    assert issued(NESTED, (0, 7)) == 2
    assert per_element(NESTED, (5, 7), threads=64, elements=32) == 2 * 127


@pytest.mark.parametrize("trips", [(), (5,), (5, 7, 2)])
def test_a_loop_without_a_count_is_no_figure(trips):
    with pytest.raises(ValueError, match="2 loops"):
        issued(NESTED, trips)


@triton.jit
def _sum_kernel(x_ptr, z_ptr, n, TIMES: tl.constexpr):
    i = tl.arange(0, 128)
    s = tl.zeros((128,), tl.float32)
    for k in range(0, n):
        x = tl.load(x_ptr + k * 128 + i)
        for _ in tl.static_range(TIMES):
            x = x * x
        s += x
    tl.store(z_ptr + i, s)


def test_a_kernel_of_so_many_products():
    """One element a thread: each product is an instruction an element, once for every trip."""
    x = meta(1 << 20, dtype=torch.float32)

    def count(times: int, trips: int) -> float:
        compiled = compile_for(_sum_kernel, 90, x, x, 64, times, num_warps=4)
        sass = disassembled(compiled.binary)
        return per_element(sass, [trips], threads=128, elements=128 * 64)

    assert count(200, 64) - count(100, 64) == 100
    assert count(200, 64) - count(200, 32) == pytest.approx(0.5 * 205, abs=3)
