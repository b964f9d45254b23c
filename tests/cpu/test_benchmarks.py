"""The scripts under benchmarks/ that count and choose, without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gpl_fast import GenericPerceptualLoss

pytest.importorskip("triton", reason="the GPU's kernels need Triton")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernels
import precision
import tune

from gpl_fast.kernels import conv_block, tiles


@pytest.mark.parametrize("kind", ["dense", "labels"])
def test_the_convolutions_counted_are_those_of_explain(kind, monkeypatch):
    shape = (2, 32, 128, 96)
    monkeypatch.setitem(kernels.WORKLOADS, "case", (*shape, kind, "softmax"))
    forward, backward = kernels.step("case", workspace_mb=24)
    pred = torch.randn(shape)
    target = torch.randn(shape) if kind == "dense" else torch.randint(0, 32, (2, 128, 96))
    said = GenericPerceptualLoss(32, backend="fast").explain(pred, target)
    assert sum(v.flops for v in (*forward, *backward)) == pytest.approx(said.flops, rel=1e-9)
    names = [v.name for v in forward]
    assert names.count("softmax_pack_fwd") * 5 == names.count("conv_block_fwd")
    gradient = 2 * pred.numel() * 4  # the logits once in, their gradient once out
    assert sum(v.bytes for v in backward if v.name == "softmax_bwd") > gradient


@pytest.mark.parametrize("name", ["voc", "ade-full, labels"])
def test_the_tables_of_the_docs_are_those_printed(name):
    docs = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text()
    assert kernels.table(name, kernels.options().parse_args([])) in docs


def test_tiles_are_counted_from_the_grid(monkeypatch):
    monkeypatch.setitem(kernels.WORKLOADS, "case", (1, 1, 32, 32, "dense", "none"))
    block = next(v for v in kernels.step("case", 64)[0] if v.name == "conv_block_fwd")
    # 8 programs x 9 taps x (2 maps x 128 pixels + 64 channels out) x 16 channels in x 2 bytes
    assert block.tiles == 8 * 9 * (2 * 128 + 64) * 16 * 2


def test_the_fastest_tile_that_runs_is_taken():
    shipped = conv_block.tile_for
    candidates = tune.CANDIDATES[:4]
    took = {candidates[0]: 3.0, candidates[2]: 1.0, candidates[3]: 2.0}
    seen = []

    def time(run):
        tile = run()
        seen.append(tile)
        if tile not in took:
            raise RuntimeError("out of shared memory")
        return took[tile]

    assert tune.fastest(lambda: conv_block.tile_for(), time, candidates) == (candidates[2], 1.0)
    assert seen == candidates
    assert conv_block.tile_for is shipped
    with pytest.raises(RuntimeError, match="not one candidate ran"):
        tune.fastest(lambda: conv_block.tile_for(), time, [candidates[1]])


def test_tuned_rows_go_before_the_shipped_ones(tmp_path, monkeypatch):
    clear = (tiles.rows.cache_clear, tiles.choose.cache_clear)
    shipped = tiles.choose(90, "bfloat16", "diff", 64, 128, 1)
    row = {"arch": 90, "dtype": "bfloat16", "form": "diff", "c_in": 64, "c_out": 128,
           "tile": [4, 8, 32, 64], "warps": 4, "stages": 2, "descriptors": False,
           "measured": "here"}  # fmt: skip
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    monkeypatch.setenv("GPL_FAST_TILES", str(tmp_path / "mine.json"))
    [c() for c in clear]
    try:
        assert tiles.choose(90, "bfloat16", "diff", 64, 128, 1) == tiles.Tile(
            4, 8, 32, 64, 4, 2, False
        )
        assert tiles.choose(90, "bfloat16", "diff", 128, 128, 1) == shipped
        assert tiles.choose(90, "bfloat16", "plain", 64, 128, 1) == shipped
    finally:
        monkeypatch.delenv("GPL_FAST_TILES")
        [c() for c in clear]


def test_a_row_of_the_precision_table():
    torch.manual_seed(0)
    *head, plain, difference, _, cosine = precision.row(5, 8, 8, "labels", torch.bfloat16)
    assert head == ["5", "8", "labels", "bfloat16"]
    assert float(difference.rstrip("%")) < 5 < float(plain.rstrip("%"))
    assert float(cosine) > 0.95
