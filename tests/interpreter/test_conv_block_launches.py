"""What `conv_block_fwd` decides before it launches, and the tuner of its tiles."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from gpl_fast import kernels, tiles
from gpl_fast.kernels import conv_block
from gpl_fast.tiles import Tile

FLOAT, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(("dtype", "allowed"), [(FLOAT, False), (FLOAT, True), (BF16, False)])
def test_only_float32_that_may_not_be_tf32_is_exact(dtype, allowed, monkeypatch):
    launched = []
    monkeypatch.setattr(conv_block, "launch", lambda *args, **meta: launched.append(meta))
    a = torch.empty(1, 4, 6, 8, dtype=dtype)
    kernels.conv_block_fwd(
        a, weight=torch.empty(72, 16, dtype=dtype), kernel_size=3, stride=1, relu=True, pool=2,
        pad_h=1, row0=0, image_rows=4, tile=Tile(8, 16, 32, 16, 4, 2, False), allow_tf32=allowed,
        y=torch.empty(1, 4, 6, 16, dtype=dtype),
    )  # fmt: skip
    exact = dtype == FLOAT and not allowed
    assert [meta["PRECISION"] for meta in launched] == ["ieee" if exact else "tf32"]


@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (2, 0, 6, 8), (2, 5, 0, 8)])
def test_nothing_is_launched_for_nothing(shape, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("launched")

    monkeypatch.setattr(conv_block, "launch", refuse)
    a = torch.empty(shape)
    partial = kernels.conv_block_fwd(
        a, weight=torch.empty(72, 16), kernel_size=3, stride=1, relu=True, pool=2, pad_h=1, row0=0,
        image_rows=shape[1], tile=Tile(8, 16, 32, 16, 4, 2, False), d=a,
        from_target=torch.ones(shape[0], dtype=torch.bool), y=torch.empty(*shape[:3], 16),
        delta=torch.empty(*shape[:3], 16), reduce=True,
    )  # fmt: skip
    assert partial.shape[0] == shape[0]
    assert not partial.any()


def test_the_tuner_writes_rows_that_are_chosen(monkeypatch):
    """Without a GPU all but its clock: launches of both forms, the fastest tile, its row."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    tune = importlib.import_module("tune")
    monkeypatch.setattr(tune, "layers", lambda classes: [(16, 24, 8)])
    tried = [Tile(4, 8, 16, 16, 4, 2, False), Tile(8, 8, 16, 16, 4, 2, True)]
    clock = iter((2.0, 1.0, 2.0, 1.0))

    def time(run):
        run()
        return next(clock)

    rows = tune.tune(19, BF16, "cpu", time, tried)
    assert [row["form"] for row in rows] == ["diff", "plain"]
    assert "1.0000 ms" in rows[0]["measured"]
    monkeypatch.setattr(tiles, "rows", lambda: rows)
    tiles.choose.cache_clear()
    chosen = [tiles.choose(80, "bfloat16", row["form"], 16, 24, 1) for row in rows]
    tiles.choose.cache_clear()
    assert chosen == [tried[1], tried[1]]
