"""The binary cross-entropy beside a walk: of a strip's rows while their logits are in a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gpl_fast.fast.chunk import Chunk
from gpl_fast.stages import BackwardStages, TritonStages


def add_losses(chunk: Chunk[TritonStages], core: tuple[int, int], ce: Tensor) -> None:
    """The sums of rows `core` into ce (n, H, 2) float64, behind `softmax_pack_fwd`."""
    first, end = core
    x = chunk.x[chunk.images]
    chunk.stages.binary_ce_fwd(x, row0=first, rows=end - first, ce_rows=ce, **_arguments(chunk))


def add_gradient(
    chunk: Chunk[Any], rows: tuple[int, int], dx: Tensor, ce_scale: Tensor | None
) -> None:
    """To `rows` of the logits' gradient dx (n, C, H, W), behind `softmax_bwd`.

    Args:
        ce_scale: (n,) float32; None: what the labels do not count is cleared and nothing added.
    """
    first, end = rows
    stages: BackwardStages = chunk.stages
    stages.binary_ce_bwd(
        chunk.x[chunk.images],
        row0=first,
        rows=end - first,
        dx=dx,
        clear=chunk.plan.call.elements,
        ce_scale=ce_scale,
        **_arguments(chunk),
    )


def _arguments(chunk: Chunk[Any]) -> dict[str, Any]:
    return {
        "labels": chunk.of("multi_hot"),
        "label_smoothing": chunk.plan.call.label_smoothing,
        "class_weight": chunk.target.get("class_weight"),
        "pos_weight": chunk.target.get("pos_weight"),
        "ce_mask": chunk.of("ce_mask"),
    }
