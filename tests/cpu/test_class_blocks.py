"""What benchmarks/class_blocks leaves out, by brute force."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "class_blocks"))

import live_blocks


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
