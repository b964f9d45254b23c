"""A target that is a list of classes: rows of a table in place of its first convolution (eq. 7)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpl_fast.fast.chunk import Chunk
from gpl_fast.stages import Listed, TritonStages


class LookUp:
    """Adds the target to the convolution of u, which `LogitsForward` describes."""

    taken: Tensor | None = None  # (n, rows, W) uint8

    def __init__(self, chunk: Chunk[TritonStages]) -> None:
        self.chunk = chunk
        self.row0 = 0
        self.table = chunk.packs.get("table")
        wide = chunk.plan.how[0].prediction.tile and not chunk.plan.call.front
        if self.table is not None and wide:  # of the dtype of what it adds to
            self.table = self.table.float()

    def begin(self, taken: Tensor | None, row0: int) -> None:
        """A strip: whose pixels have the target taken from u; its first row."""
        self.taken, self.row0 = taken, row0

    def add(self, z: Tensor, dz: Tensor, row0: int) -> None:
        """z' and δz from the convolution of u, which `dz` holds on entry; their first row."""
        chunk = self.chunk
        assert self.table is not None
        shared: dict[str, Any] = {
            "table": self.table,
            "from_target": chunk.from_target,
            "taken": self.taken,
            "taken_row0": self.row0,
            "row0": row0,
            "z": z,
            "dz": dz,
            "valid": chunk.of("valid"),
        }
        labels, values, indices = map(chunk.of, ("labels", "topk_values", "topk_indices"))
        if labels is not None:
            chunk.stages.label_conv_fwd(labels, interior=chunk.packs["interior"], **shared)
            return
        rest = chunk.of("topk_rest")
        assert values is not None
        assert indices is not None
        chunk.stages.topk_conv_fwd(
            values,
            topk_indices=indices,
            topk_rest=rest,
            rest_table=None if rest is None else chunk.packs["rest_table"],
            **shared,
        )

    def listed(self) -> Listed:
        """The same for a kernel that does the whole step."""
        chunk, values = self.chunk, self.chunk.of("topk_values")
        rest = chunk.of("topk_rest")
        assert self.taken is not None
        return Listed(
            table=chunk.packs["table"],
            taken=self.taken,
            taken_row0=self.row0,
            valid=chunk.of("valid"),
            labels=chunk.of("labels"),
            interior=chunk.packs["interior"] if values is None else None,
            values=values,
            indices=chunk.of("topk_indices"),
            rest=rest,
            rest_table=None if rest is None else chunk.packs["rest_table"],
        )


def listed_map(chunk: Chunk[TritonStages], a: int, b: int) -> Tensor:
    """Rows [a, b) of the map that a list of classes stands for, (n, C, rows, W) float32."""
    channels = chunk.plan.call.chain.in_channels
    labels, values = chunk.rows("labels", a, b), chunk.rows("topk_values", a, b)
    if labels is not None:
        return one_hot(labels, channels)
    indices, rest = chunk.rows("topk_indices", a, b), chunk.rows("topk_rest", a, b)
    assert values is not None
    assert indices is not None
    return of_list(values, indices, rest, channels)


def one_hot(labels: Tensor, channels: int) -> Tensor:
    """(n, H, W) -> (n, C, H, W) float32, 0 where there is no such class."""
    known = (labels >= 0) & (labels < channels)
    y = torch.zeros((len(labels), channels, *labels.shape[1:]), device=labels.device)
    return y.scatter_(1, labels.clamp(0, channels - 1).unsqueeze(1), known.unsqueeze(1).float())


def of_list(values: Tensor, indices: Tensor, rest: Tensor | None, channels: int) -> Tensor:
    """(n, k, H, W) values of classes -> (n, C, H, W) float32; `rest` (n, H, W) elsewhere."""
    shape = (len(values), channels + 1, *values.shape[2:])
    y = torch.zeros(shape, device=values.device)  # what is no class goes to a channel of its own
    listed = [
        torch.where((i >= 0) & (i < channels), i, channels) for i in torch.split(indices, 1, dim=1)
    ]
    if rest is not None:
        y += rest.unsqueeze(1)
        for i in listed:
            y.scatter_(1, i, 0.0)
    for i, value in zip(listed, torch.split(values, 1, dim=1), strict=True):
        y.scatter_add_(1, i, value)
    return y[:, :channels]
