"""Labels of single elements: whether each class is at a pixel, several of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.options import Options
from gpl_fast.targets import values
from gpl_fast.targets.labels import given_labels
from gpl_fast.targets.target import Target

IGNORED = 2


@dataclass(frozen=True)
class MultiHotTarget(Target):
    """The map that is 1 where a label is; made of labels that `check_elements` has seen."""

    kind = "dense"

    labels: Tensor  # (N, C, H, W) uint8: 0, 1, IGNORED

    @property
    def data(self) -> Tensor:
        return self.labels

    def activation(self, o: Options) -> str:
        return "none"

    @property
    def encodable(self) -> bool:
        return False

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        return reference.zero_invalid(reference.multi_hot(self.labels, dtype), self.valid)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return super().tensors(dtype) | {"dense": self.labels}


def check_elements(labels: Tensor, mask: Tensor | None, ignored: Sequence[int]) -> Tensor:
    """Labels (N, C, H, W) of any dtype -> uint8: 0, 1, and `IGNORED` where one does not count.

    Args:
        mask: (N, H, W) bool, True = its pixel's elements count.
        ignored: labels that do not count.

    Raises:
        ValueError: a counted label that is neither 0 nor 1, on the CPU; on CUDA, where looking
            costs a synchronisation, only with ``GPL_FAST_CHECK=1``: else that element does not
            count.
    """
    out: Tensor = torch.ops.gpl_fast.check_elements(labels, mask, list(ignored))
    return out


def _look(labels: Tensor, mask: Tensor | None, ignored: Sequence[int]) -> Tensor:
    one = labels == 1
    skip = torch.zeros_like(one) if mask is None else ~mask.unsqueeze(1).expand_as(one)
    for label in ignored:
        if _holds(labels.dtype, label):
            skip = skip | (labels == label)
    wrong = ~(one | (labels == 0) | skip)
    if values.may_look(labels) and bool(wrong.any()):
        found = torch.unique(labels[wrong])
        raise ValueError(
            f"labels: got {int(wrong.sum())} elements that are neither 0 nor 1, such as "
            f"{found[:5].tolist()}, expected 0 and 1"
            + (f" or ignore_index={given_labels(ignored)}" if ignored else "")
            + "; pass ignore_index= for elements that do not count, or mask= for pixels; soft "
            "labels go to teacher= with target_activation='none'"
        )
    out = one.to(torch.uint8, memory_format=torch.contiguous_format)
    return out.masked_fill_(skip | wrong, IGNORED)


def _holds(dtype: torch.dtype, label: int) -> bool:
    """Whether a tensor's values can be this: a scalar beyond its dtype would wrap around."""
    if dtype == torch.bool or dtype.is_floating_point:
        return dtype != torch.bool or label in (0, 1)
    limits = torch.iinfo(dtype)
    return limits.min <= label <= limits.max


def _fake(labels: Tensor, mask: Tensor | None, ignored: Sequence[int]) -> Tensor:
    return labels.new_empty(labels.shape, dtype=torch.uint8)


values.define(
    "check_elements(Tensor labels, Tensor? mask, int[] ignored) -> Tensor",
    _look,
    _fake,
)
