"""The scanners of `hazards`, and what makes a wgmma wait: code with a fault is flagged, the same
code without it is not."""

from __future__ import annotations

import re

import pytest
import torch
import triton
import triton.language as tl
from ahead_of_time import Compiled, check, compile_for, compiling_for, meta
from hazards import between_waits, from_registers, overwritten, unfenced, written
from test_kernels import conv_block

from gpl_fast import tiles

VERSION = tuple(map(int, re.findall(r"\d+", triton.__version__)[:3]))
SHIPPED = {torch.bfloat16: (8, 16, 64, 64), torch.float32: (8, 16, 32, 64)}


def compiled_with(capability, dtype, form, *, stages, descriptors):
    """`conv_block_fwd` with a tile of one's own, past the table."""
    tile = tiles.Tile(*SHIPPED[dtype], 8, stages, descriptors)
    with compiling_for(capability) as compiled:
        conv_block(capability, form=form, dtype=dtype, c_in=160, tile=tile)
    return compiled[-1]


# ------------------------------------------------------------------------- operands in registers


@triton.jit
def _pixels_by_channels_kernel(
    a_ptr, d_ptr, weight_ptr, z_ptr, H, W,
    BOTH: tl.constexpr, C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """A 3 x 3 convolution the other way around, map · weight: a descriptor's tile of pixels, made
    a matrix, goes to the tensor cores through registers."""
    P: tl.constexpr = BLOCK_H * BLOCK_W
    a_map = tl.make_tensor_descriptor(a_ptr, [H, W, C], [W * C, C, 1], [BLOCK_H, BLOCK_W, C])
    d_map = tl.make_tensor_descriptor(d_ptr, [H, W, C], [W * C, C, 1], [BLOCK_H, BLOCK_W, C])
    weights = tl.make_tensor_descriptor(weight_ptr, [9 * C, C], [C, 1], [C, C])
    z = tl.zeros((P, C), tl.float32)
    dz = z
    for tap in range(9):
        at = [tl.program_id(0) * BLOCK_H + tap // 3 - 1, tap % 3 - 1, 0]
        weight = weights.load([tap * C, 0])
        z = tl.dot(a_map.load(at).reshape(P, C), weight, z)
        if BOTH:
            dz = tl.dot(d_map.load(at).reshape(P, C), weight, dz)
    at = tl.arange(0, P)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(z_ptr + at, z * dz)


def pixels_by_channels(*, both: bool) -> Compiled:
    a, z = meta(64, 16, 64, dtype=torch.bfloat16), meta(64, 16, 64, dtype=torch.float32)
    weight = meta(9 * 64, 64, dtype=torch.bfloat16)
    return compile_for(
        _pixels_by_channels_kernel, 90, a, a, weight, z, 64, 16, BOTH=both, C=64, BLOCK_H=8,
        BLOCK_W=16, num_warps=8, num_stages=3,
    )  # fmt: skip


def test_the_other_way_around_registers_are_overwritten():
    """Why output channels go before pixels: Triton 3.9 is the first that waits."""
    compiled = pixels_by_channels(both=False)
    if VERSION < (3, 9):
        with pytest.raises(AssertionError, match=r"a wgmma in flight reads what is written by LDS"):
            check(compiled)
    assert any("goes through registers" in fault for fault in compiled.slow(4))


def test_the_other_way_around_both_branches_are_serialised():
    faults = "; ".join(pixels_by_channels(both=True).slow(8))
    assert re.search(r"ptxas says C75\d\d", faults)
    assert "goes through registers" in faults
    assert "expected 8 products from one wait to the next, got [1, 1" in faults


def test_a_wait_between_two_products_is_found():
    """Why the table has both branches in TF32 by pointers."""
    described = compiled_with(90, torch.float32, "diff", stages=3, descriptors=True)
    pointed = compiled_with(90, torch.float32, "diff", stages=3, descriptors=False)
    (fault,) = described.slow(8)
    assert re.search(r"expected 8 products from one wait to the next, got \[.*4", fault)
    assert pointed.slow(8) == [] or not tiles.fences_copies()


def test_arguments_are_counted():
    """Tuples are spread; what is constant stays behind."""
    assert pixels_by_channels(both=False).arguments == 6
    assert compiled_with(90, torch.bfloat16, "plain", stages=3, descriptors=True).arguments == 9
    assert compiled_with(90, torch.bfloat16, "labels", stages=3, descriptors=True).arguments == 15


@pytest.mark.parametrize(
    ("lines", "runs", "registers"),
    [
        (("A8", "WAIT", "A8", "WAIT"), [1, 1], 2),
        (("SHARED", "SHARED", "WAIT"), [2], 0),
        (("SHARED", "@P0 BRA 0x0", "SHARED", "WAIT", "SHARED"), [2, 1], 0),
        (("SHARED", "SHARED", "WAIT", "SYNCS", "WAIT", "EXIT"), [2], 0),
        (("EXIT",), [], 0),
    ],
)
def test_what_waits(lines, runs, registers):
    text = sass(*(globals().get(line, line) for line in lines))
    assert between_waits(text) == runs
    assert len(from_registers(text)) == registers


def sass(*lines: str) -> str:
    return "\n".join(f"  /*{16 * at:04x}*/   {line} ;" for at, line in enumerate(lines))


LOAD, OTHER = "LDSM.16.M88.4 R8, [R2+UR7]", "LDSM.16.M88.4 R12, [R2+UR7]"
A8 = "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4].tnspB, R24, gsb0"
A12, OPEN = A8.replace("R8", "R12"), A8.removesuffix(", gsb0")
SHARED = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"
WAIT, ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
NOP, EXIT = "NOP", "EXIT"


@pytest.mark.parametrize(
    ("lines", "flagged"),
    [
        ((LOAD, A8, WAIT, LOAD, EXIT), 0),
        ((LOAD, A8, LOAD, WAIT, EXIT), 1),
        ((LOAD, A8, OTHER, WAIT, EXIT), 0),
        ((LOAD, SHARED, LOAD, EXIT), 0),
        ((LOAD, OPEN, LOAD, EXIT), 1),  # not even committed
        # One group may stay in flight: the newest.
        ((LOAD, OTHER, A8, A12, ONE_LEFT, LOAD, EXIT), 0),
        ((LOAD, OTHER, A8, A12, ONE_LEFT, OTHER, EXIT), 1),
        # Around a loop, and around the outer of two.
        ((LOAD, A8, "@P0 BRA 0x0", EXIT), 1),
        ((LOAD, A8, WAIT, "@P0 BRA 0x0", EXIT), 0),
        ((LOAD, "@P1 BRA 0x10", A8, "@P0 BRA 0x0", EXIT), 1),
        # A wait on one of two paths is none.
        ((A8, "@!P0 BRA 0x30", WAIT, LOAD, EXIT), 1),
        ((A8, "@!P0 BRA 0x30", NOP, WAIT, LOAD, EXIT), 0),
        ((A8, "BRA 0x40", LOAD, EXIT, WAIT, LOAD, EXIT), 0),
        ((A8, "BSSY B0, 0x50", "@P0 BRA 0x40", "BSYNC B0", "BSYNC B0", LOAD, EXIT), 1),
        ((A8, EXIT, LOAD), 0),
        ((A8, "@P0 EXIT", LOAD, EXIT), 1),
        ((A8, "IMAD.WIDE R6, R3, 0x4, R4", EXIT), 0),
        ((A8, "IMAD.WIDE R10, R3, 0x4, R4", EXIT), 1),
        ((A8, "@P2 SHFL.BFLY PT, R11, R3, 0x1, 0x1f", EXIT), 1),
        ((A8, "STG.E desc[UR4][R8.64], R9", EXIT), 0),  # reads only
    ],
)  # fmt: skip
def test_overwritten(lines, flagged):
    assert len(overwritten(sass(*lines))) == flagged


@pytest.mark.parametrize(
    ("text", "registers"),
    [
        ("IADD3 R4, P0, PT, R8, R9, RZ", {4}),
        ("LOP3.LUT P0, R4, R8, 0x1, RZ, 0xc0, !PT", {4}),
        ("LDG.E.64.CONSTANT R4, desc[UR4][R8.64]", {4, 5}),
        ("LDS.128 R4, [R8]", {4, 5, 6, 7}),
        ("LDSM.16.MT88.2 R4, [R8]", {4, 5}),
        ("LDSM.16.MT88.4 R4, [R8]", {4, 5, 6, 7}),
        ("HMMA.16816.F32.BF16 R4, R8, R12, R4", {4, 5, 6, 7}),
        ("CS2R R4, SRZ", {4, 5}),
        ("CS2R.32 R4, SR_CLOCKLO", {4}),
        ("DFMA R4, R8, R10, R4", {4, 5}),
        ("F2F.F64.F32 R4, R8", {4, 5}),
        ("F2F.F32.F64 R4, R8", {4, 5}),  # one more than it does
        ("ATOMG.E.ADD PT, R4, desc[UR4][R8.64], R9", {4}),
        ("ISETP.GE.AND P0, PT, R4, R8, PT", set()),
        ("R2UR UR4, R8", set()),
        ("STS.128 [R8], R4", set()),
        ("WARPSYNC R4", set()),
        ("RET.REL.NODEC R4 0x0", set()),
        ("WARPGROUP.ARRIVE", set()),
    ],
)
def test_what_an_instruction_writes(text, registers):
    assert written(text) == registers


# ------------------------------------------------------------------------------------ the proxies


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_copies_without_a_fence_are_flagged(capability, dtype):
    """Pipelined pointers: the fence is Triton's where `fences_copies` says so, and taken out all
    products are flagged."""
    compiled = compiled_with(capability, dtype, "diff", stages=3, descriptors=False)
    assert "cp.async" in compiled.instructions
    assert bool(unfenced(compiled.assembly)) != tiles.fences_copies()
    without = re.sub(r"fence\.proxy\.async\.shared::cta;", "", compiled.assembly)
    products = re.findall(r"\b(?:wgmma\.mma_async|tcgen05\.mma)\.", without)
    assert len(unfenced(without)) == len(products) > 0


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("case", ["stride", "labels", "odd channels"])
def test_a_triton_without_the_fence_makes_no_such_copies(capability, case, monkeypatch):
    monkeypatch.setattr(tiles, "fences_copies", lambda: False)
    tiles.choose.cache_clear()
    options = {"stride": {"form": "diff", "pool": "stride"}, "labels": {"form": "labels"},
               "odd channels": {"form": "plain", "c_out": 21}}[case]  # fmt: skip
    with compiling_for(capability) as compiled:
        conv_block(capability, dtype=torch.bfloat16, **options)
    tiles.choose.cache_clear()
    by_pointers = "TMA load" not in compiled[-1].instructions
    assert by_pointers == (case != "labels")
    check(compiled[-1], pipelined=not by_pointers)
    assert "cp.async" not in compiled[-1].instructions


def test_the_versions_of_triton():
    """3.7.1 is the first that fences; what comes after it goes on."""
    assert (VERSION not in {(3, 6, 0), (3, 7, 0)}) == tiles.fences_copies()


COPY = "cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10"
COMMIT, ALL = "cp.async.commit_group", "cp.async.wait_all"
WAIT_0, WAIT_1 = "cp.async.wait_group 0", "cp.async.wait_group 1"
FENCE, PRODUCT = "fence.proxy.async.shared::cta", "wgmma.mma_async.sync.aligned {%r1}, %rd1, %rd2"


@pytest.mark.parametrize(
    ("lines", "flagged"),
    [
        ((COPY, COMMIT, WAIT_0, PRODUCT), 1),
        ((COPY, COMMIT, WAIT_0, FENCE, PRODUCT), 0),
        ((COPY, COMMIT, FENCE, WAIT_0, PRODUCT), 1),  # too early
        ((COPY, ALL, PRODUCT), 1),
        ((COPY, ALL, FENCE, PRODUCT), 0),
        ((COPY, COMMIT, WAIT_0, f"@%p1 {FENCE}", PRODUCT), 1),
        # What has not been waited for is not read.
        ((COPY, COMMIT, COPY, COMMIT, WAIT_1, FENCE, PRODUCT), 0),
        ((COPY, COMMIT, COPY, COMMIT, WAIT_1, FENCE, WAIT_0, PRODUCT), 1),
        (("st.shared.v4.b32 [%r1], {%r2}", PRODUCT), 1),
        (("st.shared.v4.b32 [%r1], {%r2}", FENCE, PRODUCT), 0),
        (("st.shared.v4.b32 [%r1], {%r2}", FENCE.replace("async", "tensormap"), PRODUCT), 1),
        (("cp.async.bulk.tensor.3d.shared::cluster.global [%r1], [%rd1]", PRODUCT), 0),
        (("$L1:", COPY, COMMIT, WAIT_0, FENCE, PRODUCT, "@%p1 bra $L1"), 0),
        (("$L1:", PRODUCT, COPY, COMMIT, WAIT_0, "@%p1 bra $L1"), 1),
        ((COPY, COMMIT, WAIT_0, "@%p1 bra $L1", FENCE, "$L1:", PRODUCT), 1),
        ((COPY, COMMIT, WAIT_0, FENCE, "bra.uni $L1", COPY, "$L1:", PRODUCT), 0),
        ((COPY, COMMIT, WAIT_0, "ret", PRODUCT), 0),
        # A label is known in its scope.
        (
            (
                "{",
                "L1:",
                "@!p bra L1",
                "}",
                COPY,
                COMMIT,
                WAIT_0,
                "{",
                "@!p bra L1",
                FENCE,
                "L1:",
                "}",
                PRODUCT,
            ),
            1,
        ),
    ],
)
def test_unfenced(lines, flagged):
    body = "\n".join(line if line[-1] in ":{}" else f"\t{line};" for line in lines)
    assert len(unfenced(f".visible .entry kernel()\n{{\n{body}\n\tret;\n}}")) == flagged
