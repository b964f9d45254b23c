"""`conv_block_fwd` of csrc/cuda for sm_90a, on the CPU: the difference form of 3 x 3, max pool."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import operators
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from conv_block_forward import Case, Output, check_all, inputs, run
from definitions import BF16, FLOAT, HALF, nchw, nhwc, poisoned_like, same_bits
from transport import on_device

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from halo import Halo

pytestmark = [pytest.mark.only("cuda-90", "gpu-cuda-90"), pytest.mark.needs("conv_block_bwd")]
CASE = Case(BF16, 3, "max", "diff", (34, 18), 72, None, 64, True)


@pytest.fixture
def halo(stages: Any) -> Any:
    """`benchmarks/halo.py`'s stages, whose operator is the kernel here or on the GPU."""
    on_gpu = stages.device is not None and stages.device.type == "cuda"
    own = torch.ops.gpl_fast if on_gpu else operators.load().operators
    run = Halo(own.conv_block_fwd, None).conv_block_fwd
    run = run if stages.device is None else partial(on_device, stages.device, run)
    return SimpleNamespace(name="halo", conv_block_fwd=watched(run))


def watched(stage: Any) -> Any:
    """The stage, which must leave what it reads as it is."""

    def run(a: Any, **given: Any) -> Any:
        read = [a, given["d"], given["weight"], given["from_target"]]
        before = [t.clone() for t in read]
        made = stage(a, **given)
        assert all(map(same_bits, read, before))
        return made

    return run


CASES = {
    "64 channels": CASE,
    "128 channels": replace(CASE, c_out=128, size=(18, 10)),
    "float16": replace(CASE, dtype=HALF, size=(6, 12)),
    "bias": replace(CASE, bias=True, c=19, size=(5, 9)),
    "192 channels, three tiles": replace(CASE, c_out=192, size=(4, 4), c=8),
    "two tiles of 128": replace(CASE, c_out=256, size=(4, 9), c=136),
    "odd sizes": replace(CASE, size=(33, 17), c=64),
    "one row": replace(CASE, size=(1, 9)),
    "the carried branch is the target's": replace(CASE, from_target=True, size=(7, 11)),
}


@pytest.mark.parametrize("case", CASES)
def test_against_float64(halo, case):
    given = inputs(CASES[case], images=2)
    check_all(CASES[case], given, run(halo, CASES[case], given))


def same(got: Output, wanted: Output) -> bool:
    pairs = zip(vars(got).values(), vars(wanted).values(), strict=True)
    return all(a is b is None or same_bits(a, b) for a, b in pairs)


def exact_case(channels: int, size: tuple[int, int], dtype: torch.dtype = BF16) -> Case:
    return replace(CASE, c=24, c_out=channels, size=size, dtype=dtype)


@pytest.mark.parametrize("dtype", [BF16, HALF])
@pytest.mark.parametrize("channels", [64, 128])
def test_the_same_z_gives_the_operators_bits(halo, cpu, channels, dtype):
    """Sums of quarters are exact in any order: codes, ties and NaN are the operators'."""
    case = exact_case(channels, (35, 19), dtype)
    given = inputs(case, images=2, quarters=True)
    given.a[0, 3, 5, 0], given.d[1, 7, 2, 1] = float("nan"), float("nan")
    got = run(halo, case, given)
    w = given.weight.float().view(3, 3, -1, channels).permute(3, 2, 0, 1)
    z, dz = (nhwc(F.conv2d(nchw(t).float(), w, padding=1)).contiguous() for t in (given.a, given.d))
    y, delta, code = poisoned_like(got.y, got.y, got.code)
    cpu.relu_pool_diff_fwd(
        z, dz=dz, from_target=given.from_target, pool=0, y=y, delta=delta, code=code
    )
    assert torch.equal(got.code, code)
    torch.testing.assert_close(got.y, y, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.delta, delta, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels", [64, 128])
def test_orders_agree_bit_for_bit(stages, halo, channels):
    """Of threads, of blocks, and of the copies in flight."""
    case = replace(CASE, c=136, c_out=channels, size=(35, 9))
    given, found = inputs(case, images=2), []
    for order in stages.orders.values():
        with order():
            found.append(run(halo, case, given))
    assert all(same(one, found[0]) for one in found)


@pytest.mark.parametrize("channels", [64, 128])
def test_strips_equal_the_whole(halo, channels):
    """Strips with their halo, whose first and last rows lie outside the image."""
    case = exact_case(channels, (14, 9))
    given = inputs(case, images=2, quarters=True)
    whole = run(halo, case, given)
    for r0, r1 in ((0, 6), (6, 14)):
        lo, hi = r0 - 2, r1 + 2
        maps = [F.pad(m, (0, 0, 0, 0, 8, 8))[:, 7 + lo : 9 + hi] for m in (given.a, given.d)]
        strip = replace(given, a=maps[0].contiguous(), d=maps[1].contiguous())
        part = replace(case, size=(hi - lo, 9))
        got = run(halo, part, strip, pad_h=0, row0=lo, image_rows=14)
        a, b = max(lo, 0), min(hi, 14)
        inside, rows = slice((a - lo) // 2, (b - lo) // 2), slice(a // 2, b // 2)
        for ours, wanted in ((got.y, whole.y), (got.delta, whole.delta), (got.code, whole.code)):
            assert torch.equal(ours[:, inside], wanted[:, rows])
        for out in (got.y, got.delta):
            assert not out[:, : inside.start].any()
            assert not out[:, inside.stop :].any()


def test_rows_of_larger_images(halo):
    """Every map may be rows of a taller one; its other rows are left alone."""
    case = exact_case(64, (6, 9))
    given = inputs(case, images=3, quarters=True)
    want = run(halo, case, given)

    def inner(t: torch.Tensor, fill: float) -> tuple[torch.Tensor, torch.Tensor]:
        outer = torch.full((t.shape[0], t.shape[1] + 3, *t.shape[2:]), fill, dtype=t.dtype)
        return outer, outer[:, 2:-1]

    a, d = (inner(t, float("nan"))[1].copy_(t) for t in (given.a, given.d))
    outs = [inner(want.y, 7.0), inner(want.delta, 7.0), inner(want.code, 77)]
    y, delta, code = (view for _, view in outs)
    got = run(halo, case, replace(given, a=a, d=d), y=y, delta=delta, code=code)
    assert torch.equal(got.partial, want.partial)
    for (outer, view), expected in zip(outs, (want.y, want.delta, want.code), strict=True):
        assert torch.equal(view, expected)
        assert (outer[:, :2] == outer[0, 0, 0, 0]).all()
        assert (outer[:, -1:] == outer[0, 0, 0, 0]).all()


@pytest.mark.parametrize("left_out", ["y", "delta", "code", "reduce"])
def test_what_nobody_asks_for_is_left_out(halo, left_out):
    case = exact_case(64, (4, 9))
    given = inputs(case, quarters=True)
    want = run(halo, case, given)
    got = run(halo, case, given, **{left_out: None})
    wanted = Output(**(vars(want) | {"partial" if left_out == "reduce" else left_out: None}))
    assert same(got, wanted)


@pytest.mark.only("cuda-90")
@pytest.mark.parametrize("channels", [64, 128])
def test_no_bank_conflicts_and_no_product_twice(stages, halo, channels):
    """What is put out passes through shared memory without a conflict; nine taps of both maps are
    multiplied once, 24 channels as 32; a column of taps has two boxes of pixels."""
    emulation = operators.load()
    case = exact_case(channels, (32, 16))
    emulation.count_shared(True)
    run(halo, case, inputs(case, quarters=True))
    counted = emulation.counters()
    emulation.count_shared(False)
    assert counted["shared_phases"] == counted["shared"] > 0
    assert counted["mma"] == 2 * (32 * 16 // 8) * (channels // 16) * (9 * 32 // 16)
    blocks, slabs = 2 * channels // 64, channels // 64
    assert counted["tma"] == blocks * 3 * (2 + 3 * slabs)


def test_empty_inputs(halo):
    for size in ((0, 9), (4, 0)):
        case = exact_case(64, size)
        assert run(halo, case, inputs(case), reduce=False).y.numel() == 0
    case = exact_case(64, (4, 9))
    assert run(halo, case, inputs(case, images=0), reduce=False).y.shape[0] == 0


def test_what_the_kernel_has_not_goes_to_the_others(stages):
    """Whoever they are; nothing of it reaches the operator."""
    asked = []
    others = SimpleNamespace(conv_block_fwd=lambda a, **given: asked.append(given))
    halo = SimpleNamespace(name="halo", conv_block_fwd=Halo(None, others).conv_block_fwd)
    for case in (
        replace(CASE, form="plain"), replace(CASE, pool="avg"), replace(CASE, pool="stride"),
        replace(CASE, kernel=5), replace(CASE, dtype=FLOAT), replace(CASE, c_out=72),
        replace(CASE, form="labels"),
    ):  # fmt: skip
        run(halo, replace(case, size=(4, 6)), inputs(replace(case, size=(4, 6))))
    assert len(asked) == 7


@pytest.mark.only("cuda-90")
def test_it_is_measured_beside_tritons(stages, halo, monkeypatch, capsys):
    import halo as benchmark
    import tune

    monkeypatch.setattr(tune, "WIDTHS", (64, 128))
    monkeypatch.setattr(benchmark, "halo", halo)
    monkeypatch.setattr(benchmark.kernels, "conv_block_fwd", lambda *_, **__: None)
    ran = []
    rows = benchmark.measure(19, BF16, "cpu", lambda launch: ran.append(launch()) or 2.0, 8)
    assert [(row["c_out"], row["halo_ms"], row["triton_ms"]) for row in rows] == [
        (64, 2, 2), (128, 2, 2),
    ]  # fmt: skip
    assert operators.load().counters()["tma"] > 0
