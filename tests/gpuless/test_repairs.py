"""Each repair of the interpreter, against PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import sanitizer
import torch
import triton
import triton.language as tl
from repairs import to_tf32
from triton.runtime import interpreter

HALF = [torch.float16, torch.bfloat16]


def same_bits(got, expected):
    return torch.equal(got.view(torch.int16), expected.view(torch.int16))


@triton.jit
def _operator_kernel(x_ptr, y_ptr, z_ptr, N: tl.constexpr, OPERATOR: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OPERATOR == "add":
        z = x + y
    elif OPERATOR == "multiply":
        z = x * y
    elif OPERATOR == "maximum":
        z = tl.maximum(x, y)
    elif OPERATOR == "smaller":
        z = tl.where(x < y, x, y)
    elif OPERATOR == "negate":
        z = -x
    elif OPERATOR == "abs":
        z = tl.abs(x)
    elif OPERATOR == "clamp":
        z = tl.clamp(x, -0.5, y)
    elif OPERATOR == "scalar":
        z = x * 3.0 + 1.0
    elif OPERATOR == "full":
        z = x + tl.full((N,), 0.3, x.dtype)
    elif OPERATOR == "fma":
        z = tl.fma(x, y, y)
    tl.store(z_ptr + i, z)


OPERATORS = {
    "add": lambda x, y: x + y,
    "multiply": lambda x, y: x * y,
    "maximum": torch.maximum,
    "smaller": lambda x, y: torch.where(x < y, x, y),
    "negate": lambda x, y: -x,
    "abs": lambda x, y: x.abs(),
    "clamp": lambda x, y: torch.minimum(x.clamp(min=-0.5), y),
    "scalar": lambda x, y: x * 3 + 1,
    "full": lambda x, y: x + torch.tensor(0.3, dtype=x.dtype),
    "fma": lambda x, y: (x.double() * y.double() + y.double()).to(x.dtype),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators(operator, dtype):
    if operator == "fma" and dtype == torch.float16:
        pytest.skip("Triton 3.6 to 3.8 round twice")
    x, y = torch.randn(2, 512).to(dtype)
    if operator == "clamp":
        y = y.abs()
    z = torch.empty_like(x)
    _operator_kernel[(1,)](x, y, z, 512, operator)
    assert same_bits(z, OPERATORS[operator](x, y))


@triton.jit
def _cast_kernel(x_ptr, z_ptr, N: tl.constexpr, ROUNDING: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(z_ptr + i, x.to(z_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@pytest.mark.parametrize(
    ("source", "to"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16),
        (torch.int32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.int32),
    ],
    ids=str,
)
def test_casts(source, to):
    x = (100 * torch.randn(4096)).to(source)
    z = torch.empty(4096, dtype=to)
    _cast_kernel[(1,)](x, z, 4096, None)
    assert torch.equal(z, x.to(to))


@pytest.mark.parametrize("rounding", [None, "rtne"])
def test_casts_to_bf16_of_special_values(rounding):
    half = 1 + 2.0**-8  # between two bfloat16 numbers
    values = [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3.4e38, half, half + 2.0**-7]
    x, z = torch.tensor(values), torch.empty(8, dtype=torch.bfloat16)
    x[0:1].view(torch.int32).fill_(2**31 - 1)  # a NaN that rounding would turn into -0
    _cast_kernel[(1,)](x, z, 8, rounding)
    assert z[0].isnan()
    assert same_bits(z[1:], x[1:].to(torch.bfloat16))


def test_casts_to_bf16_towards_zero():
    x, z = torch.randn(4096), torch.empty(4096, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, z, 4096, "rtz")
    assert torch.equal(z.float(), (x.view(torch.int32) & -65536).view(torch.float32))


@triton.jit
def _reduce_kernel(x_ptr, z_ptr, N: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i[:, None] * N + i[None, :])
    if KIND == "sum":
        tl.store(z_ptr + i, tl.sum(x, axis=1))
    elif KIND == "max":
        tl.store(z_ptr + i, tl.max(x, axis=1))
    elif KIND == "argmax":
        tl.store(z_ptr + i, tl.argmax(x, axis=1))
    elif KIND == "max and index":
        value, index = tl.max(x, axis=1, return_indices=True)
        tl.store(z_ptr + i, value + index)


@pytest.mark.parametrize("kind", ["sum", "max", "argmax", "max and index"])
def test_reductions_of_bf16(kind):
    x = torch.randn(32, 32, dtype=torch.bfloat16)
    expected = {
        "sum": lambda: x.float().sum(1),
        "max": lambda: x.float().amax(1),
        "argmax": lambda: x.float().argmax(1).float(),
        "max and index": lambda: x.float().amax(1) + x.float().argmax(1),
    }[kind]()
    z = torch.empty_like(expected)
    _reduce_kernel[(1,)](x, z, 32, kind)
    torch.testing.assert_close(z, expected, rtol=2.0**-8, atol=1e-2)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, z_ptr, N: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    z = tl.dot(a, b, tl.full((N, N), 1.0, tl.float32), input_precision=PRECISION)
    tl.store(z_ptr + at, z)


def dot(a, b, precision="ieee"):
    z = torch.empty(64, 64)
    _dot_kernel[(1,)](a, b, z, 64, precision)
    return z.double() - 1


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_dot(dtype):
    a, b = torch.randn(2, 64, 64).to(dtype)
    torch.testing.assert_close(dot(a, b), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_dot_in_tf32_is_coarser_than_in_float32():
    a, b = torch.randn(2, 64, 64)
    rounded = [torch.from_numpy(to_tf32(x.numpy())).double() for x in (a, b)]
    exact = a.double() @ b.double()
    torch.testing.assert_close(dot(a, b, "tf32"), rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)
    assert (dot(a, b, "tf32") - exact).abs().max() > 100 * (dot(a, b) - exact).abs().max()


def test_to_tf32_keeps_ten_bits():
    step = 2.0**-10
    given = torch.tensor([1 + 0.4 * step, 1 + 0.6 * step, -1 - 1.6 * step, 0.0, float("inf")])
    expected = torch.tensor([1, 1 + step, -1 - 2 * step, 0.0, float("inf")])
    assert torch.equal(torch.from_numpy(to_tf32(given.numpy())), expected)
    nan = torch.tensor([2**31 - 1], dtype=torch.int32).view(torch.float32)
    assert torch.from_numpy(to_tf32(nan.numpy())).isnan()


@triton.jit
def _relu_kernel(x_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(z_ptr + i, tl.maximum(x, 0.0))
    tl.store(z_ptr + N + i, tl.minimum(x, 0.0))


def test_maximum_and_minimum_drop_a_nan():
    x = torch.tensor([float("nan"), -1.0, 2.0, 0.0])
    z = torch.empty(8)
    _relu_kernel[(1,)](x, z, 4)
    assert z.tolist() == [0, 0, 2, 0, 0, -1, 0, 0]


@triton.jit
def _count_kernel(z_ptr, n):
    total = 0
    for i in range(n):
        total += i
    tl.store(z_ptr, total)


def test_range_over_a_run_time_number():
    z = torch.empty(1, dtype=torch.int32)
    _count_kernel[(1,)](z, 5)
    assert z.item() == 10


@triton.jit
def _twice(x, N: tl.constexpr):
    return x * tl.cdiv(N, tl.cdiv(N, 2))


@triton.jit
def _helper_kernel(z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(z_ptr + i, _twice(i, N) + tl.zeros((N,), tl.int32))


def test_device_functions():
    z = torch.empty(8, dtype=torch.int32)
    _helper_kernel[(1,)](z, 8)
    assert z.tolist() == list(range(0, 16, 2))


def test_the_language_is_patched_once_a_launch_and_restored(monkeypatch):
    names = ("load", "range", "reduce")
    before = [getattr(module, name) for module in (tl, tl.core) for name in names]
    patched = []
    patch = interpreter._patch_lang_core
    monkeypatch.setattr(
        interpreter, "_patch_lang_core", lambda *args: (patched.append(args[0]), patch(*args))
    )
    counts = []
    for programs in (1, 5):
        patched.clear()
        z = torch.empty(8, dtype=torch.int32)
        with sanitizer.current.equal_writes_allowed():
            _helper_kernel[(programs,)](z, 8)
        counts.append(len(patched))
    assert counts[0] == counts[1] > 1  # this module and those of `tl.cdiv` and `tl.zeros`
    after = [getattr(module, name) for module in (tl, tl.core) for name in names]
    assert all(a is b for a, b in zip(before, after, strict=True))


@triton.jit
def _far_kernel(z_ptr, n):
    at = tl.cast(tl.program_id(0), tl.int64) * 0 + n - 1
    tl.store(z_ptr + at, 7.0)


def test_a_tensor_that_is_mostly_a_hole(tmp_path, sanitizer):
    n = 5 * 2**30
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(2 * n)
    z = torch.from_file(str(tmp_path / "hole"), shared=True, size=n, dtype=torch.bfloat16)
    _far_kernel[(1,)](z, n)
    assert z[-1] == 7
    assert (tmp_path / "hole").stat().st_blocks * 512 < 2**20
    (shadow,) = sanitizer.shadows.values()
    assert isinstance(shadow.written, np.memmap)  # or 20 GB of address space


@triton.jit
def _scalar_mask_kernel(x_ptr, on_ptr, z_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    on = (i < N - 1) & (tl.load(on_ptr) != 0)
    tl.store(z_ptr + i, tl.load(x_ptr + i, mask=on, other=7.0), mask=on | (i == 0))


@pytest.mark.parametrize("on", [0, 1])
def test_a_mask_that_a_scalar_takes_part_in(on):
    x, z = torch.randn(8), torch.zeros(8)
    _scalar_mask_kernel[(1,)](x, torch.tensor([on], dtype=torch.int32), z, 8)
    want = torch.cat([x[:7], torch.zeros(1)]) if on else torch.tensor([7.0] + 7 * [0.0])
    assert torch.equal(z, want)
