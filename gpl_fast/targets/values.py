"""Operators that look at label and top-k values: ranges, signs, sums.

Operators, so that looking works inside torch.compile(fullgraph=True); defined by hand, because
`torch.library.custom_op` would import torch._dynamo at the first call: seconds.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

_LIBRARY: Any = torch.library.Library("gpl_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "check_labels(Tensor labels, Tensor? mask, int channels, int? ignore_index) -> Tensor"
)
_LIBRARY.define(
    "check_topk(Tensor values, Tensor indices, Tensor? mask, int channels, str rest)"
    " -> (Tensor, Tensor)"
)


def _check_labels(
    labels: Tensor, mask: Tensor | None, channels: int, ignore_index: int | None
) -> Tensor:
    out = labels.to(torch.int64, copy=True)
    skip = torch.zeros_like(out, dtype=torch.bool) if mask is None else ~mask
    if ignore_index is not None:
        skip |= out == ignore_index
    out.masked_fill_(skip, -1)
    highest = max(channels, 2) - 1  # one channel: masks with values 0 and 1
    wrong = ((out < 0) & ~skip) | (out > highest)
    if may_look(labels) and bool(wrong.any()):
        values = torch.unique(out[wrong])
        raise ValueError(
            f"labels: got {int(wrong.sum())} pixels outside [0, {highest}], such as "
            f"{values[:5].tolist()}, expected classes in [0, {highest}]"
            + (f" or ignore_index={ignore_index}" if ignore_index is not None else "")
            + "; pass ignore_index= for pixels that do not count, or mask="
        )
    return out.masked_fill_(wrong, -1)


def _check_labels_fake(
    labels: Tensor, mask: Tensor | None, channels: int, ignore_index: int | None
) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.int64)


def _check_topk(
    values: Tensor, indices: Tensor, mask: Tensor | None, channels: int, rest: str
) -> tuple[Tensor, Tensor]:
    out = indices.to(torch.int64, copy=True)
    n, _, h, w = values.shape
    valid = torch.ones(n, h, w, dtype=torch.bool, device=out.device)
    if mask is not None:
        valid.copy_(mask)
    wrong = (out < 0) | (out >= channels)
    if may_look(values):
        counted = valid.unsqueeze(1)
        if bool((wrong & counted).any()):
            raise ValueError(
                f"TopK: indices: got {int((wrong & counted).sum())} outside [0, {channels - 1}], "
                f"such as {torch.unique(out[wrong & counted])[:5].tolist()}, expected classes in "
                f"[0, {channels - 1}]; mask pixels that do not count"
            )
        bad = ~(values >= 0) | torch.isinf(values)
        if bool((bad & counted).any()):
            raise ValueError(
                f"TopK: values: got {int((bad & counted).sum())} that are negative or not finite, "
                "expected probabilities >= 0; mask pixels that do not count"
            )
        if rest != "renormalize" and values.numel():
            total = torch.where(counted, values, 0).sum(dim=1, dtype=torch.float32)
            # Half-precision probabilities sum to 1 within their rounding only.
            slack = values.shape[1] * torch.finfo(values.dtype).eps + 1e-5
            if bool((total > 1 + slack).any()):
                raise ValueError(
                    f"TopK: values: got sums up to {float(total.max()):.6g}, expected at most 1 "
                    f"with rest={rest!r}; use rest='renormalize'"
                )
    valid &= ~wrong.any(dim=1)
    return out.masked_fill_(wrong, 0), valid


def _check_topk_fake(
    values: Tensor, indices: Tensor, mask: Tensor | None, channels: int, rest: str
) -> tuple[Tensor, Tensor]:
    n, _, h, w = values.shape
    valid = values.new_empty((n, h, w), dtype=torch.bool)
    return indices.new_empty(indices.shape, dtype=torch.int64), valid


for _name, _run, _fake in (
    ("check_labels", _check_labels, _check_labels_fake),
    ("check_topk", _check_topk, _check_topk_fake),
):
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpl_fast::{_name}", _fake, lib=_LIBRARY)


def check_topk(
    values: Tensor, indices: Tensor, mask: Tensor | None, channels: int, rest: str
) -> tuple[Tensor, Tensor]:
    """Top-k maps (N, k, H, W) -> int64 indices in range, and (N, H, W) bool where all were.

    Raises:
        ValueError: a counted index outside ``[0, C)``, a value that is negative or not finite, or
            a sum above 1 without renormalisation; on CUDA only with ``GPL_FAST_CHECK=1``.
    """
    out: tuple[Tensor, Tensor] = torch.ops.gpl_fast.check_topk(
        values, indices, mask, channels, rest
    )
    return out


def check_labels(
    labels: Tensor, mask: Tensor | None, channels: int, ignore_index: int | None
) -> Tensor:
    """Labels (N, H, W) of any integer dtype -> int64 with -1 at pixels that do not count.

    Raises:
        ValueError: a counted label outside ``[0, C)``, on the CPU; on CUDA, where looking costs a
            synchronisation, only with ``GPL_FAST_CHECK=1``: else that pixel does not count.
    """
    out: Tensor = torch.ops.gpl_fast.check_labels(labels, mask, channels, ignore_index)
    return out


def may_look(t: Tensor) -> bool:
    """Whether values may be read: on the CPU, or where GPL_FAST_CHECK=1 accepts the sync."""
    return t.device.type == "cpu" or os.environ.get("GPL_FAST_CHECK") == "1"
