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
import live_blocks
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


def softmax_bwd(y, dy):
    """(C, H, W) by (C, H, W)."""
    return y * (dy - (y * dy).sum(dim=0))


@pytest.mark.parametrize("scope", ["image", "tile", "pixel"])
def test_what_is_left_out_stays_within_the_tolerance(scope):
    torch.manual_seed(0)
    tile, size, tolerance = (4, 8), 4, 2.0**-5
    # Few classes matter in a tile, and nearly the same ones in its pixels and around it.
    coarse = 6 * torch.randn(30, 1, 1) + 2 * torch.randn(30, 2, 2, dtype=torch.float64)
    logits = coarse.repeat_interleave(4, dim=1).repeat_interleave(8, dim=2)
    y = (logits + torch.randn_like(logits)).softmax(dim=0)
    dy = torch.randn_like(y)
    labels = logits.argmax(dim=0)
    order = torch.randperm(30)
    forward = live_blocks.forward_passes(y, labels)[0]
    for p in (forward, live_blocks.backward_pass(y, dy)):
        maps = [live_blocks.blocks(part, order, size) for part in p.parts]
        ranking = live_blocks.rank(live_blocks.Cut.of(p, maps, tile), scope)
        live = ranking.live(tolerance)  # (8, 4)
        assert 0.2 < live.double().mean() < 0.9
        lost, norm = [], []  # squares by tile and pixel
        for t in range(4):
            stays = torch.zeros(30, dtype=torch.bool)
            stays[order] = live[:, t].repeat_interleave(size)[:30]
            i, j = t // 2 * 4, t % 2 * 8
            if p is forward:
                u = live_blocks.label_difference(y, labels)
                u = torch.nn.functional.pad(u, (1, 1, 1, 1))[:, i : i + 6, j : j + 10]
                padded = torch.nn.functional.pad(p.norm, (1, 1, 1, 1))
                lost.append(u[~stays].square().sum(dim=0))
                norm.append(padded[i : i + 6, j : j + 10])
            else:
                box = (slice(None), slice(i, i + 4), slice(j, j + 8))
                exact = softmax_bwd(y[box], dy[box])
                kept = softmax_bwd(y[box], dy[box] * stays.view(-1, 1, 1))
                lost.append((kept - exact).square().sum(dim=0))
                norm.append(exact.square().sum(dim=0))
        over = {"image": (0, 1, 2), "tile": (1, 2), "pixel": ()}[scope]
        lost, norm = torch.stack(lost), torch.stack(norm)
        if over:
            lost, norm = lost.sum(dim=over), norm.sum(dim=over)
        assert (lost <= tolerance**2 * norm * (1 + 1e-9)).all()
        assert (lost > 0).any()


@pytest.mark.parametrize("scope", ["image", "tile", "pixel"])
def test_live_blocks_of_a_known_map(scope):
    entries = torch.zeros(64, 16, 32, dtype=torch.float64)
    entries[:16] = 1.0
    entries[16:32] = 1e-6
    p = live_blocks.Pass((entries.square(),), entries.square().sum(dim=0))
    maps = [live_blocks.blocks(entries.square(), torch.arange(64), 16)]
    ranking = live_blocks.rank(live_blocks.Cut.of(p, maps, (8, 16)), scope)
    for tolerance, blocks in ((0.0, [0, 1]), (1e-7, [0, 1]), (1e-5, [0])):
        live = ranking.live(tolerance)
        assert torch.equal(live.any(dim=1).nonzero().flatten(), torch.tensor(blocks))
        assert torch.equal(live.all(dim=1), live.any(dim=1))


def test_clusters_put_together_what_matters_together():
    group = torch.arange(64) % 4
    live = group.unsqueeze(1) == torch.arange(40).unsqueeze(0) % 4  # (C, T)
    order = live_blocks.cluster(live, 16)
    assert torch.equal(order.sort().values, torch.arange(64))
    assert all(len(group[block].unique()) == 1 for block in order.split(16))
