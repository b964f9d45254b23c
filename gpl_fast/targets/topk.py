"""Top-k maps: the k largest classes of each pixel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.options import Options
from gpl_fast.targets import values
from gpl_fast.targets.data.topk import TopK
from gpl_fast.targets.masks import normalise_mask, restricted
from gpl_fast.targets.target import Target, check_like


@dataclass(frozen=True)
class TopKTarget(Target):
    """The map that `TopK` stands for."""

    kind = "topk"

    topk: TopK  # (N, k, H, W), indices int64 and in range
    channels: int

    @classmethod
    def takes(cls, given: object) -> bool:
        return isinstance(given, TopK)

    @classmethod
    def resolve(
        cls,
        given: object,
        channels: int,
        o: Options,
        *,
        mask: Tensor | None,
        pred: Tensor | None,
        what: str,
    ) -> Self:
        assert isinstance(given, TopK)
        # Made anew: one that a pytree was mapped to has not been checked.
        topk = TopK(given.values, given.indices, given.rest)
        listed = topk.values.detach()
        n, _, *size = listed.shape
        check_like(listed, "TopK target", pred, size)
        height, width = size
        mask = normalise_mask(mask, n, (height, width), listed.device)
        indices, in_range = check_topk(listed, topk.indices, mask, channels, topk.rest)
        # On the CPU out-of-range indices raise, so the mask alone decides; on CUDA they invalidate.
        keep = mask if indices.device.type in ("cpu", "meta") else restricted(mask, in_range)
        return cls((height, width), keep, TopK(listed, indices, topk.rest), channels)

    @property
    def data(self) -> Tensor:
        return self.topk.values

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        listed = reference.zero_invalid(self.topk.values, self.valid)
        y = reference.dense_topk(listed, self.topk.indices, self.topk.rest, self.channels, dtype)
        return reference.zero_invalid(y, self.valid)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = super().tensors(dtype)
        indices = self.topk.indices.contiguous()
        listed = reference.zero_invalid(self.topk.values.float(), self.valid)
        if self.topk.rest == "renormalize":
            listed = reference.renormalized(listed)
        tensors |= {"topk_values": listed.contiguous(), "topk_indices": indices}
        if self.topk.rest == "uniform":
            tensors["topk_rest"] = self._rest(listed, indices)
        if indices.shape[1] == 0:  # one entry of no class: an empty list has no memory to point at
            tensors["topk_values"] = listed.new_zeros(listed.shape[0], 1, *listed.shape[2:])
            tensors["topk_indices"] = torch.full_like(tensors["topk_values"], -1, dtype=torch.int64)
        return tensors

    def _rest(self, listed: Tensor, indices: Tensor) -> Tensor:
        """What each class that is not listed gets of the mass that is not, (N, H, W)."""
        ordered = indices.sort(dim=1).values
        classes = (ordered.diff(dim=1) != 0).sum(dim=1) + min(indices.shape[1], 1)
        unlisted = self.channels - classes
        return (1 - listed.sum(dim=1)).clamp(min=0) * (unlisted > 0) / unlisted.clamp(min=1)


def check_topk(
    listed: Tensor, indices: Tensor, mask: Tensor | None, channels: int, rest: str
) -> tuple[Tensor, Tensor]:
    """Top-k maps (N, k, H, W) -> int64 indices in range, and (N, H, W) bool where all were.

    Raises:
        ValueError: a counted index outside ``[0, C)``, a value that is negative or not finite, or
            a sum above 1 without renormalisation; on CUDA only with ``GPL_FAST_CHECK=1``.
    """
    mask = None if mask is None else reference.counted(mask)
    out: tuple[Tensor, Tensor] = torch.ops.gpl_fast.check_topk(
        listed, indices, mask, channels, rest
    )
    return out


def _look(
    listed: Tensor, indices: Tensor, mask: Tensor | None, channels: int, rest: str
) -> tuple[Tensor, Tensor]:
    out = indices.to(torch.int64, copy=True)
    n, _, h, w = listed.shape
    valid = torch.ones(n, h, w, dtype=torch.bool, device=out.device)
    if mask is not None:
        valid.copy_(mask)
    wrong = (out < 0) | (out >= channels)
    if values.may_look(listed):
        counted = valid.unsqueeze(1)
        if bool((wrong & counted).any()):
            raise ValueError(
                f"TopK: indices: got {int((wrong & counted).sum())} outside [0, {channels - 1}], "
                f"such as {torch.unique(out[wrong & counted])[:5].tolist()}, expected classes in "
                f"[0, {channels - 1}]; mask pixels that do not count"
            )
        _refuse_values(listed, counted, rest)
    valid &= ~wrong.any(dim=1)
    return out.masked_fill_(wrong, 0), valid


def _refuse_values(listed: Tensor, counted: Tensor, rest: str) -> None:
    bad = ~(listed >= 0) | torch.isinf(listed)
    if bool((bad & counted).any()):
        raise ValueError(
            f"TopK: values: got {int((bad & counted).sum())} that are negative or not finite, "
            "expected probabilities >= 0; mask pixels that do not count"
        )
    if rest != "renormalize" and listed.numel():
        total = torch.where(counted, listed, 0).sum(dim=1, dtype=torch.float32)
        # Half-precision probabilities sum to 1 within their rounding only.
        slack = listed.shape[1] * torch.finfo(listed.dtype).eps + 1e-5
        if bool((total > 1 + slack).any()):
            raise ValueError(
                f"TopK: values: got sums up to {float(total.max()):.6g}, expected at most 1 "
                f"with rest={rest!r}; use rest='renormalize'"
            )


def _fake(
    listed: Tensor, indices: Tensor, mask: Tensor | None, channels: int, rest: str
) -> tuple[Tensor, Tensor]:
    n, _, h, w = listed.shape
    valid = listed.new_empty((n, h, w), dtype=torch.bool)
    return indices.new_empty(indices.shape, dtype=torch.int64), valid


values.define(
    "check_topk(Tensor values, Tensor indices, Tensor? mask, int channels, str rest)"
    " -> (Tensor, Tensor)",
    _look,
    _fake,
)
