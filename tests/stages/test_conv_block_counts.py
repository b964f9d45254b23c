"""What the emulation counts while a block's backward runs: passes over shared memory, its bytes,
products, and which kernel was taken."""

from __future__ import annotations

import sys
from pathlib import Path

import operators
import pytest
import torch
from conv_block_backward import Block, Logits
from definitions import BF16, DTYPES, FLOAT, check

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from registers import dynamic_shared

pytestmark = [
    pytest.mark.only("cuda"),
    pytest.mark.needs("conv_block_bwd", "conv_block_logits_bwd"),
]


@pytest.fixture
def emulation(stages):
    return operators.load()


@pytest.fixture
def phases(emulation):
    """Function: (passes over shared memory of the last launch, the fewest there can be)."""

    def counted():
        found = emulation.counters()
        assert found["ldmatrix"] > 0
        assert found["shared"] > 0
        least = found["ldmatrix"] + found["shared"]
        return found["ldmatrix_phases"] + found["shared_phases"], least

    emulation.count_shared(True)
    yield counted
    emulation.count_shared(False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bank_conflicts(stages, phases, dtype):
    """Each 8x8 matrix, and each 128 bytes of a warp's other accesses, takes one pass over the
    banks: dZ as it is expanded, both operands, dx on its way out."""
    for c_in in (64, 128):
        for k in (3, 5):
            tf32 = dtype == FLOAT
            Block(c_in=c_in, c_out=128, h=16, w=32, k=k, dtype=dtype, tf32=tf32).run(stages)
            taken, least = phases()
            assert taken == least


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("classes", [19, 64, 150, 256])
def test_no_bank_conflicts_of_logits(stages, phases, classes, channels_last):
    """Of every tile of classes."""
    Logits(Block(c_in=classes, c_out=128, h=8, w=16), channels_last=channels_last).run(stages)
    taken, least = phases()
    assert taken == least


@pytest.mark.parametrize("k", [3, 7])
@pytest.mark.parametrize("channels", [64, 128])
def test_shared_memory_is_what_docs_kernels_says(stages, emulation, channels, k):
    hopper = stages.name == "cuda-90"
    emulation.play(90 if hopper else 80, shared_kib=227)
    Block(c_in=channels, c_out=72, k=k).run(stages)
    name = f"sm90_kernel<bf16, {channels}, false>" if hopper else f"kernel<bf16, {channels}>"
    _, expected = dynamic_shared(f"conv_block_bwd_{name}", k)
    assert emulation.counters()["dynamic_shared_bytes"] == expected


@pytest.mark.parametrize(("classes", "tile"), [(19, 32), (64, 64), (150, 160), (256, 256)])
def test_shared_memory_of_logits_is_what_docs_kernels_says(stages, emulation, classes, tile):
    hopper = stages.name == "cuda-90"
    emulation.play(90 if hopper else 80, shared_kib=227)
    Logits(Block(c_in=classes, c_out=72, h=2, w=2)).run(stages)
    name = f"bwd_sm90_kernel<bf16, {tile}, true>" if hopper else f"logits_bwd_kernel<bf16, {tile}>"
    _, expected = dynamic_shared(f"conv_block_{name}", 3)
    assert emulation.counters()["dynamic_shared_bytes"] == expected


@pytest.mark.only("cuda-80")
@pytest.mark.parametrize("classes", [150, 257])
def test_less_shared_memory(stages, emulation, classes):
    """A GPU with 99 KiB takes narrower tiles of classes for large kernels."""
    logits = Logits(Block(c_in=classes, c_out=128, k=7))
    emulation.play(86)
    logits.check(logits.run(stages))


@pytest.mark.only("cuda-90")
def test_the_kernel_of_sm_80_on_sm_90(stages, emulation, monkeypatch):
    """GPL_FAST_SM90A=0 takes it, so that one GPU runs both."""
    block = Block(c_in=72, c_out=136)
    hopper = block.run(stages)
    assert emulation.counters()["tma"] > 0
    monkeypatch.setenv("GPL_FAST_SM90A", "0")
    other = block.run(stages)
    counters = emulation.counters()
    assert (counters["tma"], counters["cp_async"] > 0) == (0, True)
    check(hopper, other, block.dx(torch.float64), BF16)
    emulation.play(80)
    assert torch.equal(block.run(stages), other)


def test_work_is_the_products_of_the_tiles(stages, emulation):
    """No tap, chunk or tile is multiplied twice: 128 pixels x 64 channels x 9 x 64."""
    Block(c_in=64, c_out=64, h=8, w=16).run(stages)
    assert emulation.counters()["mma"] == (128 // 16) * (64 // 8) * (9 * 64 // 16)
