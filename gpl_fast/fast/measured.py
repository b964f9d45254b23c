"""Which of two data gradients is faster on a GPU: measurements decide, nothing is searched.

``data_gradient.json`` has a row a layer and GPU, and ``GPL_FAST_DATA_GRADIENT`` names a file of
rows that go before them (``benchmarks/tune.py`` writes it).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TypedDict

from gpl_fast import environment

# A measured row speaks for layers of up to so many times its input channels, or as many fewer.
REACH = 1.5


class Row(TypedDict):
    """Milliseconds of both data gradients for one image of one layer, on one GPU.

    ``dtype`` "float32" is TF32: true float32 is always ATen's. ``first``: the layer whose input is
    the activation of the logits, timed through to their gradient.
    """

    arch: int
    dtype: str
    first: bool
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    kernel_ms: float
    aten_ms: float
    measured: str


@functools.cache
def rows() -> list[Row]:
    """All rows, those that go first first."""
    found: list[Row] = environment.rows("GPL_FAST_DATA_GRADIENT")
    found += json.loads(Path(__file__).with_name("data_gradient.json").read_text())
    return found


def nearest(
    arch: int, dtype: str, layer: tuple[bool, int, int, int], in_channels: int
) -> Row | None:
    """The row of this GPU, dtype and `layer` (first, out_channels, kernel_size, stride) with the
    nearest number of input channels."""

    def ratio(row: Row) -> float:
        return max(row["in_channels"], in_channels) / min(row["in_channels"], in_channels)

    fitting = [
        row
        for row in rows()
        if (row["arch"], row["dtype"]) == (arch, dtype)
        and (row["first"], row["out_channels"], row["kernel_size"], row["stride"]) == layer
        and ratio(row) <= REACH
    ]
    return min(fitting, key=ratio, default=None)
