"""The harness on kernels of its own: what it must report of each architecture."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import CAPABILITIES, SHARED_LIMIT, TENSOR_CORE, check, compile_for, meta
from ahead_of_time import compiling_for as compiling
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _matmul_kernel(
    a_ptr,  # (M, K)
    b_ptr,  # (K, N)
    c_ptr,  # (M, N)
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    m0 = tl.program_id(0) * BLOCK_M
    n0 = tl.program_id(1) * BLOCK_N
    a_desc = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_desc = tl.make_tensor_descriptor(b_ptr, [K, N], [N, 1], [BLOCK_K, BLOCK_N])
    m = m0 + tl.arange(0, BLOCK_M)[:, None]
    n = n0 + tl.arange(0, BLOCK_N)[None, :]
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        if DESCRIPTORS:
            a = a_desc.load([m0, k0])
            b = b_desc.load([k0, n0])
        else:
            a = tl.load(a_ptr + m * K + k0 + tl.arange(0, BLOCK_K)[None, :])
            b = tl.load(b_ptr + (k0 + tl.arange(0, BLOCK_K)[:, None]) * N + n)
        c = tl.dot(a, b, c, input_precision=PRECISION)
    tl.store(c_ptr + m * N + n, c.to(c_ptr.dtype.element_ty), (m < M) & (n < N))


def operands(dtype=torch.bfloat16, size=512):
    return *(meta(size, size, dtype=dtype) for _ in range(3)), size, size, size


def matmul(capability, *, dtype=torch.bfloat16, block=(64, 64, 64), precision="tf32",
           descriptors=True, **options):  # fmt: skip
    return compile_for(
        _matmul_kernel, capability, *operands(dtype), *block, precision, descriptors, **options
    )


@pytest.mark.parametrize("capability", [*CAPABILITIES, "gfx942"])
def test_every_architecture(capability):
    compiled = matmul(capability, num_warps=4, num_stages=3)
    check(compiled)
    assert compiled.kernel == "_matmul_kernel"
    assert compiled.warps == 4
    assert 32 < compiled.registers <= 255
    assert 0 < compiled.shared <= SHARED_LIMIT[capability]


def test_the_instructions_follow_the_architecture_and_the_loads():
    assert {"wgmma", "TMA load"} <= matmul(90).instructions
    assert "TMA load" not in matmul(90, descriptors=False).instructions
    assert {"cp.async", "mma.sync", "ldmatrix"} <= matmul(80).instructions
    assert "cp.async" not in matmul(80, num_stages=1).instructions


def test_spills_are_reported():
    big = matmul(80, block=(128, 256, 32), num_warps=4, num_stages=3)
    assert big.spills > 0
    with pytest.raises(AssertionError, match=r"expected no spills; got _matmul_kernel for 80"):
        check(big)


def test_unpipelined_loads_are_reported():
    compiled = matmul(80, num_stages=1)
    check(compiled, pipelined=False)
    with pytest.raises(AssertionError, match="expected pipelined loads"):
        check(compiled)


def test_a_product_off_the_tensor_cores_is_reported():
    compiled = matmul(90, dtype=torch.float32, precision="ieee", block=(32, 32, 32))
    check(compiled, tensor_core=None, pipelined=False)
    with pytest.raises(AssertionError, match="expected wgmma"):
        check(compiled, pipelined=False)


def test_the_older_instruction_on_a_newer_architecture_is_reported():
    compiled = matmul(90, block=(16, 64, 64))
    check(compiled, tensor_core="mma.sync")
    with pytest.raises(AssertionError, match="expected wgmma"):
        check(compiled)


def test_shared_memory_above_the_limit_is_reported():
    ampere, ada = matmul(80, num_stages=9), matmul(89, num_stages=9)
    assert ampere.shared == ada.shared == 128 << 10  # eight stages in flight, twice 8 KiB each
    check(ampere)
    with pytest.raises(AssertionError, match="expected at most 101376 bytes of shared memory"):
        check(ada)


@triton.jit
def _atomic_kernel(x_ptr, z_ptr, N: tl.constexpr):
    tl.atomic_add(z_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, N))))


def test_float_atomics_are_reported():
    floats, whole = meta(64, dtype=torch.float32), meta(64, dtype=torch.int32)
    for capability in (80, 90):
        compiled = compile_for(_atomic_kernel, capability, floats, floats, 64)
        with pytest.raises(AssertionError, match="expected no float atomics"):
            check(compiled, tensor_core=None, pipelined=False)
        compiled = compile_for(_atomic_kernel, capability, whole, whole, 64)
        check(compiled, tensor_core=None, pipelined=False)


def launcher(a, b):
    """As a package would have it: sizes from the tensors, a grid from the sizes."""
    c = torch.empty_like(a)
    size = a.shape[0]
    _matmul_kernel[lambda meta: (size // meta["BLOCK_M"], size // meta["BLOCK_N"])](
        a, b, c_ptr=c, M=size, N=size, K=size,
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, PRECISION="tf32", DESCRIPTORS=False, num_warps=4,
    )  # fmt: skip
    return c


@pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("kind", ["meta", "fake", "real"])
def test_a_launcher_with_any_tensors(kind):
    with FakeTensorMode() if kind == "fake" else nullcontext():
        device = {"meta": "meta", "fake": "cuda", "real": "cpu"}[kind]
        a, b = torch.ones(2, 256, 256, dtype=torch.float16, device=device)
        with compiling(80) as first, compiling(90) as second:
            assert launcher(a, b).shape == (256, 256)
            launcher(a, b)
    assert [entry.capability for entry in second] == [90, 90]
    assert not first
    assert "wgmma" in second[0].instructions


@pytest.mark.parametrize("device", ["meta", "cuda"])
def test_a_misaligned_view_is_specialised_as_such(device):
    with FakeTensorMode() if device == "cuda" else nullcontext():
        a, b, c = torch.empty(3, 512, 512, dtype=torch.bfloat16, device=device)
        longer = torch.empty(512 * 512 + 1, dtype=a.dtype, device=device)
        shifted = longer.narrow(0, 1, 512 * 512).view(512, 512)
    assembly = [
        compile_for(_matmul_kernel, 80, x, b, c, *[512] * 3, *[64] * 3, "tf32", False).assembly
        for x in (a, shifted, a)
    ]
    assert assembly[0] == assembly[2] != assembly[1]


@triton.jit
def _host_descriptor_kernel(x_desc, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z_ptr + i[:, None] * N + i[None, :], x_desc.load([0, 0]))


def test_host_descriptors():
    x = TensorDescriptor(meta(64, 64, dtype=torch.bfloat16), [64, 64], [64, 1], [32, 32])
    z = meta(32, 32, dtype=torch.bfloat16)
    assert "TMA load" in compile_for(_host_descriptor_kernel, 90, x, z, 32).instructions


def test_the_driver_and_the_launch_are_restored():
    run, active = triton.runtime.jit.JITFunction.run, triton.runtime.driver._active
    with pytest.raises(ZeroDivisionError), compiling(80):
        raise ZeroDivisionError
    assert triton.runtime.jit.JITFunction.run is run
    assert triton.runtime.driver._active is active


def test_every_architecture_has_a_limit_and_an_instruction():
    assert set(SHARED_LIMIT) == set(TENSOR_CORE) == {*CAPABILITIES, "gfx942"}
