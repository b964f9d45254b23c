"""Who makes a layer's data gradient on a GPU: measurements decide, nothing is searched.

Either `conv_block_bwd` of csrc/cuda, which expands dZ while it is loaded and, in the first layer,
goes on through the softmax; or an un-pool operator, ATen's convolution and `softmax_bwd`.
``data_gradient.json`` holds what was measured, a row a layer and GPU; where nothing was, ATen's
it is. ``GPL_FAST_DATA_GRADIENT`` names a file of rows that go before them, as
``benchmarks/tune.py`` writes it.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import TypedDict

import torch

from gpl_fast import environment
from gpl_fast.chain.stages import compiled_on
from gpl_fast.graphs import constant_in_graphs

# A row speaks for layers of up to so many times its input channels, or so many times fewer.
REACH = 1.5


class Row(TypedDict):
    """Milliseconds of both ways for one image of one layer, on one GPU.

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
    found += json.loads(Path(__file__).with_suffix(".json").read_text())
    return found


@constant_in_graphs
def by_kernel(
    device: torch.device,
    dtype: torch.dtype,
    first: bool,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int,
) -> bool:
    """Whether `conv_block_bwd` makes the data gradient of such a layer."""
    if compiled_on(device) is None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    layer = (first, out_channels, kernel_size, stride)
    row = nearest(10 * major + minor, str(dtype).removeprefix("torch."), layer, in_channels)
    return row is not None and row["kernel_ms"] < row["aten_ms"]


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
