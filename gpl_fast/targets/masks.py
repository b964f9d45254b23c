"""Which pixels count: masks (N, H, W) or (N, 1, H, W) bool, True = valid."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from gpl_fast.input_checks import describe
from gpl_fast.targets import values


def normalise_mask(
    mask: Tensor | None, batch: int, size: tuple[int, int], device: torch.device
) -> Tensor | None:
    """A mask -> (N, H, W) bool, which a graph may save.

    Raises:
        TypeError: not bool.
        ValueError: another shape or device.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"mask: got {describe(mask)}, expected torch.bool, True = valid; use (mask > 0)"
        )
    if tuple(mask.shape) not in ((batch, *size), (batch, 1, *size)):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {(batch, *size)} or "
            f"{(batch, 1, *size)}, the prediction's size, or that of a dense target; resize it "
            "with mode='nearest'"
        )
    if mask.device != device:
        raise ValueError(f"mask: got device {mask.device}, expected {device}; use mask.to(...)")
    return savable(mask).reshape(batch, *size)


def has_size(mask: Tensor | None, size: tuple[int, ...]) -> TypeGuard[Tensor]:
    """Whether this is a mask of maps of `size` (H, W)."""
    return isinstance(mask, Tensor) and mask.dim() in (3, 4) and tuple(mask.shape[-2:]) == size


def savable(mask: Tensor) -> Tensor:
    """A copy of a tensor made under `torch.inference_mode`, which no graph may save."""
    if torch.compiler.is_compiling() or not mask.is_inference():
        return mask
    return mask.clone()


def check_same_mask(given: Tensor, stored: Tensor | None, message: str) -> Tensor | None:
    """Hold a mask (N, H, W) to the one that stored features were made with.

    Returns:
        In a compiled graph a 0 that has to reach the result, or the graph would leave the look out;
        else None.

    Raises:
        ValueError: `message`; on CUDA, of masks that differ in values, only with
            ``GPL_FAST_CHECK=1``.
    """
    if stored is None or given.shape != stored.shape:
        raise ValueError(message)
    seen: Tensor = torch.ops.gpl_fast.check_same_mask(given, stored, message)
    return seen if torch.compiler.is_compiling() else None


def _look(given: Tensor, stored: Tensor, message: str) -> Tensor:
    if values.may_look(given) and not torch.equal(given, stored):
        raise ValueError(message)
    return given.new_zeros((), dtype=torch.float32)


def _fake(given: Tensor, stored: Tensor, message: str) -> Tensor:
    return given.new_empty((), dtype=torch.float32)


values.define("check_same_mask(Tensor given, Tensor stored, str message) -> Tensor", _look, _fake)
