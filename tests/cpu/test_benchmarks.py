"""The scripts under benchmarks/ that count and choose, without a GPU."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU's kernels need Triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import precision
import tune

from gpl_fast import tiles

ROOT = Path(__file__).resolve().parents[2]


def test_the_fastest_tile_that_runs_is_taken():
    candidates = tune.CANDIDATES[:4]
    took = {candidates[0]: 3.0, candidates[2]: 1.0, candidates[3]: 2.0}
    seen = []

    def time(run):
        tile = run()
        seen.append(tile)
        if tile not in took:
            raise RuntimeError("out of shared memory")
        return took[tile]

    assert tune.fastest(lambda tile: tile, time, candidates) == (candidates[2], 1.0)
    assert seen == candidates
    with pytest.raises(RuntimeError, match="not one candidate ran"):
        tune.fastest(lambda tile: tile, time, [candidates[1]])


def test_tuned_rows_go_before_the_shipped_ones(tmp_path, monkeypatch):
    shipped = tiles.choose(90, "bfloat16", "diff", 64, 128, 1)
    row = {"arch": 90, "dtype": "bfloat16", "form": "diff", "c_in": 64, "c_out": 128,
           "tile": [4, 8, 32, 64], "warps": 4, "stages": 2, "descriptors": False,
           "measured": "here"}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    monkeypatch.setenv("GPL_FAST_TILES", str(tmp_path / "mine.json"))
    tiles.choose.cache_clear()
    try:
        assert tiles.choose(90, "bfloat16", "diff", 64, 128, 1) == tiles.Tile(
            4, 8, 32, 64, 4, 2, False
        )
        assert tiles.choose(90, "bfloat16", "diff", 128, 128, 1) == shipped
        assert tiles.choose(90, "bfloat16", "plain", 64, 128, 1) == shipped
    finally:
        monkeypatch.delenv("GPL_FAST_TILES")
        tiles.choose.cache_clear()


def test_a_row_of_the_precision_table():
    torch.manual_seed(0)
    row = precision.row(5, 8, 8, "labels", torch.bfloat16)
    assert row[:4] == ["5", "8", "labels", "bfloat16"]
    plain, *ours = (float(value.rstrip("%")) for value in row[4:8])
    assert max(ours) < 5 < plain
    assert min(map(float, row[9:])) > 0.95


def test_resident_memory_does_not_grow_with_the_images():
    """But for inputs, gradient and saved tensors; freed memory goes back to the system at once."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    transient = []
    for shape in ((1, 32, 256, 256), (4, 32, 256, 256)):
        code = (
            "from gpl_fast.tools import batch\n"
            f"used = batch.used_by('fast', {shape}, 'dense', 'cpu', 32)\n"
            "print(used.peak, used.saved)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True
        )
        peak, saved = done.stdout.split()
        if peak == b"None":
            pytest.skip("the system does not tell")
        gradient = 4 * math.prod(shape)
        transient.append((int(peak) - gradient - int(saved)) / 2**20)
    assert transient[1] <= transient[0] + 2
    assert max(transient) <= 32


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_launch_is_made_without_a_driver():
    """In a process of its own: it compiles, and has a library in the driver's place."""
    code = (
        "import launches, torch\n"
        "found = launches.rows(2, 3, classes=5, forms=('labels',))\n"
        "print(*[' '.join(row) for row in found], sep='\\n')\n"
        "assert launches.flat(('i32', 'constexpr', ('*fp32', ('i1', 'constexpr')))) == 3\n"
        "assert torch.cuda.device.__name__ == 'device'\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first.startswith("empty, of four arguments 4 ")
    assert first.endswith(" 1.00 ")
    names = {line.partition(",")[0] for line in others}
    assert names >= {"softmax_pack_fwd", "conv_block_fwd", "relu_pool_bwd", "softmax_bwd"}
    assert names >= {"look", "decide"}  # two of one stage
    for line in others:
        arguments, took, times, *whole = line.partition("labels ")[2].split()
        assert len(whole) == (not line.startswith("decide,"))
        assert 4 < int(arguments) < 100
        assert float(took) > 0
        assert float(times) > 0
