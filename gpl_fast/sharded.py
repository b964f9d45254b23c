"""DTensors: every process has the loss of its own images."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Inlined where calls are counted: what cannot hold a DTensor.
PLAIN = (Tensor, type(None))


def local(*given: Any) -> list[Any]:
    """Of each DTensor this process' part, ``to_local()``; what is none stays as it is.

    Raises:
        ValueError: a DTensor that is no shard of the batch and not whole in every process.
    """
    return [_local(x) for x in given]


def _local(x: Any) -> Any:
    if not isinstance(x, Tensor) or not hasattr(x, "placements"):
        return x
    if not all(p.is_shard(0) or p.is_replicate() for p in x.placements):
        raise ValueError(
            f"got a DTensor of shape {tuple(x.shape)} with placements {tuple(x.placements)}, "
            "expected shards of the batch, Shard(0): the loss is one of whole images; use "
            ".redistribute(placements=[Shard(0)]), or .full_tensor() for all of it everywhere"
        )
    return x.to_local()  # type: ignore[attr-defined]
