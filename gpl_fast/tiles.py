"""Which tile a convolution runs with: data, not search; Triton is not imported.

``tiles.json`` holds rows by architecture, dtype, form and maybe channels; a row that carries a
measurement says where it was made. ``GPL_FAST_TILES`` names a file of rows that go before them, as
``benchmarks/tune.py`` writes it.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import NotRequired, TypedDict

from gpl_fast import environment

FORMS = ("plain", "diff", "listed")  # one branch; both; both, of which the target is looked up


@dataclass(frozen=True)
class Tile:
    """Pixels (rows x columns) by input channels by output channels of a program."""

    block_h: int
    block_w: int
    block_k: int
    block_n: int
    warps: int
    stages: int
    descriptors: bool


class Row(TypedDict):
    """A line of the data; ``tile`` is block_h, block_w, block_k, block_n."""

    arch: int
    dtype: str
    form: str
    tile: list[int]
    warps: int
    stages: int
    descriptors: bool
    c_in: NotRequired[int]
    c_out: NotRequired[int]
    measured: NotRequired[str]


@functools.cache
def rows() -> list[Row]:
    """All rows, those that go first first."""
    found: list[Row] = environment.rows("GPL_FAST_TILES")
    found += json.loads(Path(__file__).with_suffix(".json").read_text())
    return found


@functools.cache
def choose(arch: int, dtype: str, form: str, c_in: int, c_out: int, stride: int) -> Tile:
    """The first row that fits, of the newest architecture up to `arch` (90 is sm_90), cut to these
    channels and to what the compiler gets right there, whoever wrote the row."""
    fitting = [
        row
        for row in rows()
        if row["dtype"] == dtype
        and row["form"] in (form, "any")
        and row["arch"] <= arch
        and row.get("c_in", c_in) == c_in
        and row.get("c_out", c_out) == c_out
    ]
    newest = max(row["arch"] for row in fitting)
    row = next(row for row in fitting if row["arch"] == newest)
    h, w, k, n = row["tile"]
    k = min(k, max(16, 1 << (c_in - 1).bit_length()))
    n = min(n, max(16, 1 << (c_out - 1).bit_length()))
    descriptors = row["descriptors"] and c_in % 8 == 0 and c_out % 8 == 0 and stride == 1
    return safe(Tile(h, w, k, n, row["warps"], row["stages"], descriptors), arch, form)


def safe(tile: Tile, arch: int, form: str) -> Tile:
    """The tile as the compiler gets it right there."""
    if form == "listed" and 90 <= arch < 100:
        # Descriptors' operands would go to registers that a wgmma in flight still reads.
        tile = replace(tile, descriptors=False)
    unfenced = 90 <= arch < 120 and not tile.descriptors and not fences_copies()
    return replace(tile, stages=1) if unfenced else tile


@functools.cache
def fences_copies() -> bool:
    """Whether Triton puts a proxy fence between asynchronous copies into shared memory and the
    products of sm_90 to sm_11x that read them there: 3.6.0 and 3.7.0 do not. Where there is no
    Triton, as the newest."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        try:  # PyTorch's nightly builds have it under other names
            version = importlib.import_module("triton").__version__
        except ImportError:
            return True
    return tuple(map(int, re.findall(r"\d+", version)[:3])) >= (3, 7, 1)
