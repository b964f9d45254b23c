"""Which of two is faster on a GPU, data gradients of a layer or `softmax_bwd` of csrc/cuda and of
Triton: measurements decide, nothing is searched.

``data_gradient.json`` has a row a layer and GPU, ``softmax_bwd.json`` one a number of classes and
GPU; ``GPL_FAST_DATA_GRADIENT`` and ``GPL_FAST_SOFTMAX_BWD`` name files of rows that go before them
(``benchmarks/tune.py`` writes them).
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, TypedDict

from gpl_fast import environment

# A measured row speaks for up to so many times its input channels or classes, or as many fewer.
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


class SoftmaxRow(TypedDict):
    """Milliseconds of `softmax_bwd` of csrc/cuda and of Triton for one image of so many classes."""

    arch: int
    classes: int
    cuda_ms: float
    triton_ms: float
    measured: str


@functools.cache
def rows() -> list[Row]:
    """All rows of data gradients, those that go first first."""
    found: list[Row] = environment.rows("GPL_FAST_DATA_GRADIENT")
    found += _shipped("data_gradient.json")
    return found


@functools.cache
def softmax_rows() -> list[SoftmaxRow]:
    """All rows of `softmax_bwd`, those that go first first."""
    found: list[SoftmaxRow] = environment.rows("GPL_FAST_SOFTMAX_BWD")
    found += _shipped("softmax_bwd.json")
    return found


def nearest(
    arch: int, dtype: str, layer: tuple[bool, int, int, int], in_channels: int
) -> Row | None:
    """The row of this GPU, dtype and `layer` (first, out_channels, kernel_size, stride) with the
    nearest number of input channels."""
    fitting = [
        row
        for row in rows()
        if (row["arch"], row["dtype"]) == (arch, dtype)
        and (row["first"], row["out_channels"], row["kernel_size"], row["stride"]) == layer
        and _ratio(row["in_channels"], in_channels) <= REACH
    ]
    return min(fitting, key=lambda row: _ratio(row["in_channels"], in_channels), default=None)


def softmax_bwd(backward: str, arch: int, classes: int) -> str:
    """Who has that stage, where `backward` has the others: "triton" for "compiled" if the row of
    this GPU with the nearest number of classes says that it is faster."""
    fitting = [
        row
        for row in softmax_rows()
        if row["arch"] == arch and _ratio(row["classes"], classes) <= REACH
    ]
    row = min(fitting, key=lambda row: _ratio(row["classes"], classes), default=None)
    faster = row is not None and row["triton_ms"] < row["cuda_ms"]
    return "triton" if faster and backward == "compiled" else backward


def _ratio(a: int, b: int) -> float:
    return max(a, b) / min(a, b)


def _shipped(name: str) -> list[Any]:
    found: list[Any] = json.loads(Path(__file__).with_name(name).read_text())
    return found
