"""What the sanitizer must report, and what it must let pass."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def _copy_kernel(x_ptr, z_ptr, n_load, n_store, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(z_ptr + i, tl.load(x_ptr + i, i < n_load), i < n_store)


def reported(message):
    return pytest.raises(InterpreterError, match=message)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_within_bounds(dtype):
    x, z = torch.ones(13, dtype=dtype), torch.empty(13, dtype=dtype)
    _copy_kernel[(2,)](x, z, 13, 13, 8)
    assert torch.equal(x, z)


@triton.jit
def _scalar_in_mask_kernel(z_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(z_ptr + i, 1.0, (i < n) & (tl.program_id(0) >= 0))


def test_a_mask_with_a_scalar_in_it():
    z = torch.zeros(13)
    _scalar_in_mask_kernel[(1,)](z, 13, 16)
    assert z.all()
    with reported("store out of bounds"):
        _scalar_in_mask_kernel[(1,)](z, 14, 16)


def test_load_out_of_bounds():
    x, z = torch.ones(13), torch.empty(16)
    with reported(r"load out of bounds in program \(1, 0, 0\): 3 of 8 .*tensor argument 0.* 13 el"):
        _copy_kernel[(2,)](x, z, 16, 16, 8)


def test_store_out_of_bounds():
    x, z = torch.ones(16), torch.empty(13)
    with reported("store out of bounds"):
        _copy_kernel[(2,)](x, z, 16, 16, 8)


def test_out_of_bounds_into_another_argument():
    both = torch.zeros(16)
    with reported("store out of bounds"):
        _copy_kernel[(1,)](both[8:], both[:6], 8, 8, 8)
    assert not both.any()


def test_out_of_bounds_in_the_gap_of_a_view():
    x, z = torch.ones(16), torch.zeros(16)
    with reported("store out of bounds"):
        _copy_kernel[(1,)](x, z[::2], 8, 8, 8)
    with reported("store out of bounds"):
        _copy_kernel[(1,)](x, z.view(4, 4)[:, :3], 4, 4, 4)
    assert not z.any()


def test_an_empty_argument_holds_nothing():
    with reported("load out of bounds"):
        _copy_kernel[(1,)](torch.empty(0), torch.empty(8), 1, 8, 8)


@triton.jit
def _offset_kernel(x_ptr, z_ptr, row, width):
    tl.store(z_ptr, tl.load(x_ptr + row * width))


def test_an_offset_that_wraps_at_32_bits(tmp_path):
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(3 * 2**30)
    x = torch.from_file(str(tmp_path / "hole"), shared=True, size=3 * 2**30, dtype=torch.uint8)
    z = torch.empty(1, dtype=torch.uint8)
    with reported("load out of bounds"):
        _offset_kernel[(1,)](x, z, 5 * 2**14, 2**15)
    _offset_kernel[(1,)](x, z, 3 * 2**14, 2**15)
    assert z.item() == 0


@triton.jit
def _descriptor_kernel(x_ptr, z_ptr, H, W, C: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [H, W, C], [W * C, C, 1], [BLOCK, BLOCK, C])
    z = tl.make_tensor_descriptor(z_ptr, [H, W, C], [W * C, C, 1], [BLOCK, BLOCK, C])
    z.store([-1, -1, 0], x.load([-1, -1, 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_descriptors(dtype, sanitizer):
    x, z = (torch.zeros(3, 3, 16, dtype=dtype) for _ in range(2))
    _descriptor_kernel[(1,)](x, z, 3, 3, 16, 8)
    assert not sanitizer.unwritten(z).any()
    with reported("load out of bounds"):
        _descriptor_kernel[(1,)](x, z, 4, 3, 16, 8)


@triton.jit
def _wide_kernel(x_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z_ptr + i, tl.load(x_ptr.to(tl.pointer_type(tl.int32)) + i))


def test_a_wider_view_of_an_argument():
    x, z = torch.ones(7, dtype=torch.uint8), torch.empty(2, dtype=torch.int32)
    _wide_kernel[(1,)](x, z, 1)
    assert z[0] == 0x01010101
    with reported("load out of bounds"):
        _wide_kernel[(1,)](x, z, 2)


@triton.jit
def _choose_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z_ptr + i, tl.load(tl.where(i % 2 == 0, x_ptr + i, y_ptr + i)))


def test_pointers_into_two_arguments():
    x, y, z = torch.zeros(8), torch.ones(8), torch.empty(8)
    _choose_kernel[(1,)](x, y, z, 8)
    assert z.tolist() == [0, 1] * 4
    with reported("1 of 4 addresses are not tensor argument 1 "):
        _choose_kernel[(1,)](x, y[:7], z, 8)


@triton.jit
def _address_kernel(address, z_ptr):
    tl.store(z_ptr, tl.load(tl.cast(address, tl.pointer_type(tl.float32))))


def test_an_address_of_no_argument():
    x, z = torch.ones(1), torch.empty(1)
    with reported("load out of bounds .* 1 addresses of no argument"):
        _address_kernel[(1,)](x.data_ptr(), z)


@triton.jit
def _race_kernel(z_ptr, step, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK)
    tl.store(z_ptr + pid * (BLOCK - 1) + i, (pid * step + i % (BLOCK - 1)).to(tl.float32))


def test_two_programs_write_one_address(sanitizer):
    z = torch.empty(17)
    with reported(r"race: program \(1, 0, 0\) wrote 1 elements .* program \(.*0.*\) wrote"):
        _race_kernel[(2,)](z, 0, 8)
    with sanitizer.equal_writes_allowed():
        _race_kernel[(2,)](z, 0, 8)
    with sanitizer.equal_writes_allowed(), reported("race"):
        _race_kernel[(2,)](z, 1, 8)
    with reported("race"):
        _race_kernel[(2,)](z, 0, 8)


def test_two_launches_may_write_one_address():
    z = torch.empty(8)
    for _ in range(2):
        _race_kernel[(1,)](z, 0, 8)


@triton.jit
def _each_kernel(x_ptr, z_ptr):
    pid = tl.program_id(0)
    tl.store(z_ptr + pid, tl.load(x_ptr + pid))


def test_a_program_reads_what_another_writes():
    x = torch.zeros(5)
    with reported("race: .* read 1 elements .* wrote"):
        _each_kernel[(4,)](x, x[1:])
    with reported("race: .* wrote 1 elements .* read"):
        _each_kernel[(4,)](x[1:], x)
    _each_kernel[(4,)](x, x)


@triton.jit
def _read_all_kernel(x_ptr, N: tl.constexpr):
    pid = tl.program_id(0)
    total = tl.sum(tl.load(x_ptr + tl.arange(0, N)))
    if pid == N - 1:
        tl.store(x_ptr + pid, total)


def test_many_readers_before_a_writer():
    with reported("race: .* that several programs read"):
        _read_all_kernel[(4,)](torch.zeros(4), 4)


@triton.jit
def _atomic_kernel(x_ptr, z_ptr):
    tl.atomic_add(z_ptr, tl.load(x_ptr + tl.program_id(0)))


@triton.jit
def _swap_kernel(z_ptr):
    tl.atomic_cas(z_ptr, 6, 7)


def test_atomics(sanitizer):
    z = torch.zeros(1, dtype=torch.int32)
    _atomic_kernel[(4,)](torch.arange(4, dtype=torch.int32), z)
    _swap_kernel[(1,)](z)
    assert z.item() == 7
    assert not sanitizer.unwritten(z)
    with reported("atomic out of bounds"):
        _swap_kernel[(1,)](z[:0])
    with reported("atomic out of bounds"):
        _atomic_kernel[(1,)](torch.arange(4, dtype=torch.int32), z[:0])
    with reported("atomic addition of floats"):
        _atomic_kernel[(4,)](torch.arange(4.0), torch.zeros(1))


def test_unwritten_elements(sanitizer):
    x, z = torch.ones(16, dtype=torch.uint8), torch.empty(16, dtype=torch.uint8)
    assert sanitizer.unwritten(z).all()
    _copy_kernel[(2,)](x, z, 16, 13, 8)
    assert sanitizer.unwritten(z).nonzero().flatten().tolist() == [13, 14, 15]
    assert sanitizer.unwritten(z[::5]).tolist() == [False, False, False, True]


def test_the_sanitizer_forgets_between_tests(sanitizer):
    assert not sanitizer.shadows


def test_memory_starts_poisoned():
    assert torch.empty(5).isnan().all()
    assert torch.empty(2, 8, 3, 3, memory_format=torch.channels_last).bfloat16().isnan().all()
    assert (torch.empty_like(torch.zeros(5, dtype=torch.uint8)) == 255).all()
    assert torch.zeros(3).new_empty(4).isnan().all()
    assert torch.empty_strided((2, 3), (3, 1)).isnan().all()
