"""The shipped elementwise CUDA kernels, run on the CPU, against the CPU operators.

Routing is compared bit for bit; the softmax with float64, to the CPU operators' own bound.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import emulate
import pytest
import torch
from extremes import TEMPERATURES, by_kind, logits_of_every_kind
from saved import log_sum_exp

from gpl_fast import ops

if (reason := ops.load()) is not None:
    pytest.skip(reason, allow_module_level=True)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUMBER = {dtype: i for i, dtype in enumerate(DTYPES)}
NONE, SOFTMAX, SIGMOID = 0, 1, 2
MAX, AVG = 0, 1
# Order of threads and blocks: forward, reverse, three random ones.
ORDERS = [0, 1, 2, 3, 4]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    given = os.environ.get("GPL_FAST_TEST_KERNELS")
    if given:
        return emulate.load(Path(given))
    objects = emulate.kernels(emulate.ELEMENTWISE)
    folder = tmp_path_factory.mktemp("elementwise")
    return emulate.load(emulate.build(folder, objects, "elementwise.cpp"))


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    monkeypatch.setenv("CUDACPU_ORDER", str(request.param))


def address(t):
    return 0 if t is None else t.data_ptr()


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


# ------------------------------------------------------------------------------------------- relu


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 19, 64])
def test_relu_bwd(kernels, order, C, dtype):
    shape = (2, 5, 7, C)
    dy, mask = torch.randn(shape).to(dtype), torch.randint(256, (*shape[:3], (C + 7) // 8)).byte()
    dy.view(-1)[:3] = torch.tensor([-float("inf"), float("inf"), -0.0])
    want, got = torch.empty_like(dy), poisoned(*shape, dtype=dtype)
    ops.relu_bwd(dy, mask=mask, dz=want)

    def run(dy, dz):
        kernels.relu_bwd(2 * 5 * 7, C, NUMBER[dtype], *map(address, (dy, mask, dz)))

    run(dy, got)
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    run(dy, dy)  # in place
    assert torch.equal(dy.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_bwd_where_vectors_may_not_start(kernels, dtype):
    buffer, mask = torch.randn(1 + 35 * 16).to(dtype), torch.randint(256, (1, 5, 7, 2)).byte()
    dy = buffer[1:].view(1, 5, 7, 16)
    want, got = torch.empty_like(dy), poisoned(1, 5, 7, 16, dtype=dtype)
    ops.relu_bwd(dy, mask=mask, dz=want)
    kernels.relu_bwd(35, 16, NUMBER[dtype], *map(address, (dy, mask, got)))
    assert torch.equal(got, want)


# -------------------------------------------------------------------------------------- relu_pool


def pool_case(pool, C, size, dtype):
    """dy (2, H / 2, W / 2, C) and random codes or masks."""
    H, W = size
    dy = torch.randn(2, H // 2, W // 2, C).to(dtype)
    if pool == AVG:
        return dy, torch.randint(256, (2, H, W, (C + 7) // 8)).byte()
    winner = torch.randint(5, (2, H // 2, W // 2, C + C % 2)).byte()
    return dy, winner[..., ::2] | winner[..., 1::2] << 4


def relu_pool_bwd(kernels, pool, dy, code, size, row0, dz):
    kernels.relu_pool_bwd(
        (dy.shape[0], *size, dy.shape[3]), row0, dz.shape[1], pool, NUMBER[dy.dtype],
        *map(address, (dy, code, dz)), (dy.stride(0), code.stride(0), dz.stride(0)),
    )  # fmt: skip
    return dz


@pytest.mark.parametrize("pool", [MAX, AVG])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("C", "size"), [(64, (13, 27)), (3, (7, 33)), (19, (2, 2)), (40, (8, 6)), (12, (3, 70))]
)
def test_relu_pool_bwd(kernels, order, C, size, dtype, pool):
    dy, code = pool_case(pool, C, size, dtype)
    H, W = size
    for row0, rows in [(0, H), (-1, H + 3), (-3, 4), (1, H - 1), (H - 1, 5)]:
        want, got = (poisoned(2, rows, W, C, dtype=dtype) for _ in range(2))
        ops.relu_pool_bwd(dy, code=code, pool=pool, height=H, width=W, row0=row0, dz=want)
        relu_pool_bwd(kernels, pool, dy, code, size, row0, got)
        assert torch.equal(got, want)


@pytest.mark.parametrize("pool", [MAX, AVG])
def test_relu_pool_bwd_of_slices(kernels, pool):
    """Image strides of larger buffers, which no vector divides."""
    dy, code = pool_case(pool, 16, (6, 10), torch.float32)
    buffers = [torch.full((2, t[0].numel() + 3), 7, dtype=t.dtype) for t in (dy, code)]
    wide = []
    for buffer, t in zip(buffers, (dy, code), strict=True):
        wide.append(buffer[:, : t[0].numel()].view_as(t))
        wide[-1].copy_(t)
    want = poisoned(2, 6, 10, 16, dtype=torch.float32)
    ops.relu_pool_bwd(dy, code=code, pool=pool, height=6, width=10, row0=0, dz=want)
    outer = torch.full((2, 6 * 10 * 16 + 5), 9.0)
    got = outer[:, : 6 * 10 * 16].view(2, 6, 10, 16)
    relu_pool_bwd(kernels, pool, *wide, (6, 10), 0, got)
    assert torch.equal(got, want)
    assert (outer[:, 6 * 10 * 16 :] == 9).all()


# ---------------------------------------------------------------------------------------- softmax


def layout(x, kind):
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if kind == "sliced":  # no stride is 1
        n, c, h, w = x.shape
        return torch.full((n, c * 2, h, w * 2), 9.0).to(x.dtype)[:, ::2, :, ::2].copy_(x)
    return x.contiguous()


def both(kernels, x, dy, *, activation=SOFTMAX, temperature=1.0, valid=None, labels=None,
         weight=None, smoothing=0.0, strip=None, dx_kind=None, ce_scale=None):  # fmt: skip
    """(ours, the CPU operator's), each (N, C, H, W) in x's dtype, and both scales."""
    N, _, H, _ = x.shape
    row0, rows = strip or (0, H)
    lse, ce_lse = (log_sum_exp(x, t).float().contiguous() for t in (temperature, 1.0))
    scale = torch.linspace(0.5, 1.5, N)
    ce_scale = torch.linspace(2, 1, N) if ce_scale is None else ce_scale
    own = labels is not None and not (activation == SOFTMAX and temperature == 1.0)
    clean = torch.full_like(x, float("nan"))
    ours, cpu = (layout(clean, dx_kind) if dx_kind else clean.clone() for _ in range(2))
    given = scale if dy is not None else None
    ops.softmax_bwd(
        x, lse=lse, dy=dy, scale=given, valid=valid, activation=activation, temperature=temperature,
        ce_labels=labels, ce_lse=ce_lse if own else None,
        ce_scale=ce_scale if labels is not None else None, class_weight=weight,
        label_smoothing=smoothing, row0=row0, rows=rows, dx=cpu,
    )  # fmt: skip
    kernels.softmax_bwd(
        x.shape, address(x), x.stride(), NUMBER[x.dtype], address(lse), address(dy),
        0 if dy is None else dy.shape[3], 0 if dy is None else NUMBER[dy.dtype], address(given),
        address(valid), activation, temperature, address(labels), address(ce_lse),
        address(ce_scale), address(weight), smoothing, row0, rows, address(ours), ours.stride(),
    )  # fmt: skip
    return ours, cpu, (scale, ce_scale)


def truth(x, dy, scales, *, activation=SOFTMAX, temperature=1.0, valid=None, labels=None,
          weight=None, smoothing=0.0, work=torch.float64):  # fmt: skip
    v = x.to(work).nan_to_num().requires_grad_()
    scale, ce_scale = (s.to(work) for s in scales)
    z = v / temperature
    y = z.softmax(1) if activation == SOFTMAX else z.sigmoid() if activation == SIGMOID else z
    total = v.sum() * 0
    if dy is not None:
        g = dy[..., : x.shape[1]].permute(0, 3, 1, 2).to(work).nan_to_num()
        g = g if valid is None else g * valid[:, None]
        total = total + (y * g * scale.view(-1, 1, 1, 1)).sum()
    if labels is not None:
        known = labels.where((labels >= 0) & (labels < x.shape[1]), torch.tensor(-1))
        ce = torch.nn.functional.cross_entropy(
            v, known, None if weight is None else weight.to(work), ignore_index=-1,
            reduction="none", label_smoothing=smoothing,
        )  # fmt: skip
        total = total + (ce * ce_scale.view(-1, 1, 1)).sum()
    return torch.autograd.grad(total, v)[0]


def check(ours, plain, exact):
    """err(ours, float64) <= 2 err(PyTorch in float32, rounded, float64) + 1e-6; no NaN."""
    bound = 2 * (plain.double() - exact).abs().max() + 1e-6 * max(1, exact.abs().max())
    assert (ours.double() - exact).abs().max() <= bound


# (C, (H, W)): one tile and a rest, several tiles, a chunk and a rest of channels
SOFTMAX_SIZES = [(1, (3, 33)), (3, (1, 5)), (19, (4, 64)), (150, (2, 70)), (257, (1, 32))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("C", "size"), SOFTMAX_SIZES)
def test_softmax_bwd(kernels, C, size, dtype):
    for activation, temperature, kind, x_dtype, extra in [
        (SOFTMAX, 1.0, "nchw", torch.float32, 0),
        (SOFTMAX, 2.5, "channels_last", torch.bfloat16, 5),
        (SIGMOID, 2.0, "sliced", torch.float16, 3),
        (NONE, 3.0, "channels_last", torch.float32, -C % 8),
        (SOFTMAX, 0.5, "nchw", torch.float16, 0),
    ]:
        x = layout((3 * torch.randn(2, C, *size)).to(x_dtype), kind)
        dy = torch.randn(2, *size, C + extra).to(dtype)
        how = {"activation": activation, "temperature": temperature}
        ours, cpu, scales = both(kernels, x, dy, **how)
        exact, plain = (truth(x, dy, scales, work=w, **how) for w in (torch.float64, torch.float32))
        for mine in (ours, cpu):
            check(mine, plain.to(x_dtype), exact)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softmax_bwd_at_any_temperature(kernels, temperature):
    for C in (3, 19):
        x, dy = logits_of_every_kind(2, C, 2, 40), torch.randn(2, 2, 40, C)
        ours, _, scales = both(kernels, x, dy, temperature=temperature)
        exact, plain = (
            truth(x, dy, scales, temperature=temperature, work=work)
            for work in (torch.float64, torch.float32)
        )
        for mine, theirs, true in by_kind(ours, plain, exact):
            check(mine, theirs, true)


def test_a_cross_entropy_of_weight_0_has_no_gradient(kernels):
    x, labels = logits_of_every_kind(2, 19, 2, 40), torch.randint(0, 19, (2, 2, 40))
    for temperature in (0.3, 1.0):
        how = {"labels": labels, "temperature": temperature, "smoothing": 0.1}
        nothing = both(kernels, x, None, **how, ce_scale=torch.zeros(2))[0]
        assert (nothing == 0).all()
        assert (both(kernels, x, None, **how, weight=torch.zeros(19))[0] == 0).all()


def test_softmax_bwd_orders(kernels, monkeypatch):
    """Other orders of threads and blocks, channels at once and in chunks: not a bit differs."""
    for C in (19, 600):
        x, dy = torch.randn(1, C, 2, 45), torch.randn(1, 2, 45, C)
        labels, weight = torch.randint(-1, C, (1, 2, 45)), torch.rand(C)
        results = []
        for order in ORDERS:
            monkeypatch.setenv("CUDACPU_ORDER", str(order))
            how = {"labels": labels, "weight": weight, "smoothing": 0.1}
            results.append(both(kernels, x, dy, **how)[0])
        assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("C", [3, 19, 600])
@pytest.mark.parametrize(
    ("activation", "temperature"), [(SOFTMAX, 1.0), (SOFTMAX, 2.0), (NONE, 1.0), (SIGMOID, 1.0)]
)
def test_softmax_bwd_with_cross_entropy_and_invalid_pixels(kernels, C, activation, temperature):
    shape = (2, C, 2, 37)
    for weight, smoothing, dense in [
        (None, 0.0, True), (torch.rand(C), 0.2, True), (torch.rand(C), 0.0, False)
    ]:  # fmt: skip
        x, labels = 3 * torch.randn(shape), torch.randint(-1, C, (2, 2, 37))
        labels[0, 0, 0] = C + 3
        valid, dy = torch.rand(2, 2, 37) > 0.3, torch.randn(2, 2, 37, C)
        dead = ~valid & (labels < 0)
        x[dead[:, None].expand_as(x)] = float("nan")
        dy[~valid] = float("nan")
        how = {
            "activation": activation, "temperature": temperature, "labels": labels,
            "weight": weight, "smoothing": smoothing, "valid": valid,
        }  # fmt: skip
        given = dy if dense else None
        ours, _, scales = both(kernels, x, given, **how)
        exact, plain = (
            truth(x, given, scales, work=w, **how) for w in (torch.float64, torch.float32)
        )
        check(ours, plain, exact)
        assert not ours.permute(0, 2, 3, 1)[dead].any()


@pytest.mark.parametrize("x_dtype", DTYPES)
def test_layouts_and_strips_give_the_same_bits(kernels, x_dtype):
    x, dy = torch.randn(2, 22, 7, 64).to(x_dtype), torch.randn(2, 7, 64, 24).bfloat16()
    whole = both(kernels, x, dy)[0]
    for kind in ("nchw", "channels_last", "sliced"):
        for dx_kind in ("nchw", "channels_last", "sliced"):
            got = both(kernels, layout(x, kind), dy, dx_kind=dx_kind)[0]
            assert torch.equal(got, whole)
    around = torch.nn.functional.pad(dy, (0, 0, 0, 0, 2, 2), value=float("nan"))[:, 1:6]
    part = both(kernels, x, around.contiguous(), strip=(-1, 5))[0]
    assert torch.equal(part[:, :, :4], whole[:, :, :4])
    assert part[:, :, 4:].isnan().all()


def test_nothing_to_do(kernels):
    x, dy = torch.empty(0, 3, 4, 5), torch.empty(0, 4, 5, 3)
    assert both(kernels, x, dy)[0].shape == x.shape
    kernels.relu_bwd(0, 8, 0, 0, 0, 0)
    kernels.relu_pool_bwd((1, 4, 4, 8), 0, 0, MAX, 0, 0, 0, 0, (0, 0, 0))


def test_under_sanitizers(tmp_path):
    """Out of bounds, misaligned and undefined accesses, in this file's own tests."""
    asan = subprocess.run(
        [os.environ.get("CXX", "c++"), "-print-file-name=libasan.so"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    objects = emulate.kernels(emulate.ELEMENTWISE, emulate.SANITIZED)
    library = emulate.build(tmp_path, objects, "elementwise.cpp", *emulate.SANITIZED)
    environment = {
        **os.environ, "GPL_FAST_TEST_KERNELS": str(library), "LD_PRELOAD": asan,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }  # fmt: skip
    chosen = "(relu or softmax_bwd or nothing) and not sanitizers and not order1 and not dtype2"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", __file__, "-k",
         chosen],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
