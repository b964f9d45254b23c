"""Which tile a convolution runs with: data, not search; Triton is not imported.

``tiles.json`` holds rows by architecture, dtype, form and maybe channels: what compiles best there
(registers, no spills, one wait for the tensor cores a step of the loop), until it is measured; a
row that carries a measurement says where it was made. ``GPL_FAST_TILES`` names a file of rows that
go before them on the architecture that each names, as ``benchmarks/tune.py`` writes it.
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
    """A line of the data; ``tile`` is block_h, block_w, block_k, block_n. One with descriptors is
    for stride 1 and channels that 8 divides alone."""

    arch: int
    dtype: str
    form: str
    tile: list[int]
    warps: int
    stages: int
    descriptors: bool
    c_in: NotRequired[int]
    c_out: NotRequired[int]
    c_out_max: NotRequired[int]
    measured: NotRequired[str]


@functools.cache
def rows() -> list[Row]:
    """Those that are shipped."""
    found: list[Row] = json.loads(Path(__file__).with_suffix(".json").read_text())
    return found


@functools.cache
def choose(arch: int, dtype: str, form: str, c_in: int, c_out: int, stride: int) -> Tile:
    """Of the row that fits, cut to these channels and to what the compiler gets right there,
    whoever wrote the row."""
    row = row_of(arch, dtype, form, c_in, c_out, stride)
    h, w, k, n = row["tile"]
    fewest = 64 if 90 <= arch < 120 else 16  # rows of a product there
    n = min(n, max(fewest, 1 << (c_out - 1).bit_length()))
    tile = Tile(h, w, depth(k, c_in), n, row["warps"], row["stages"], row["descriptors"])
    return safe(tile, arch)


def row_of(arch: int, dtype: str, form: str, c_in: int, c_out: int, stride: int) -> Row:
    """The first that fits, of the newest architecture up to `arch` (90 is sm_90) that has one; of a
    user's rows those of `arch` alone: sm_86 has less shared memory than sm_80."""
    own: list[Row] = [row for row in environment.rows("GPL_FAST_TILES") if row["arch"] == arch]
    described = c_in % 8 == 0 and c_out % 8 == 0 and stride == 1
    fitting = [
        row
        for row in own + rows()
        if row["dtype"] == dtype
        and row["form"] in (form, "any")
        and row["arch"] <= arch
        and row.get("c_in", c_in) == c_in
        and row.get("c_out", c_out) == c_out
        and c_out <= row.get("c_out_max", c_out)
        and (described or not row["descriptors"])
    ]
    return max(fitting, key=lambda row: row["arch"])  # of several the first


def depth(block_k: int, c_in: int) -> int:
    """At most `block_k` input channels at a time; fewer where that leaves out an eighth of what is
    multiplied: 150 classes, in memory 152, are 5 times 32 and not 3 times 64."""
    block_k = min(block_k, max(16, 1 << (c_in - 1).bit_length()))
    while block_k > 32:
        whole, halves = (-(-c_in // k) * k for k in (block_k, block_k // 2))
        if 8 * halves > 7 * whole:
            break
        block_k //= 2
    return block_k


def safe(tile: Tile, arch: int) -> Tile:
    """The tile as the compiler gets it right there."""
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
