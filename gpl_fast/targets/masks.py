"""Which pixels count, and how much: masks (N, H, W) or (N, 1, H, W), bool or floating.

A floating one holds the weight m of each pixel, finite and >= 0; one above 0 counts.
"""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor

from gpl_fast.input_checks import FLOAT_DTYPES, describe
from gpl_fast.targets import values


def normalise_mask(
    mask: Tensor | None, batch: int, size: tuple[int, int], device: torch.device
) -> Tensor | None:
    """A mask -> (N, H, W) bool or float32, which a graph may save; it gets no gradient.

    Raises:
        TypeError: neither bool nor floating.
        ValueError: another shape or device; a weight that is negative or not finite: on CUDA only
            with ``GPL_FAST_CHECK=1``, there what is not above 0 does not count.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        raise TypeError(
            f"mask: got {describe(mask)}, expected torch.bool, True = valid, or floating weights "
            ">= 0; use (mask > 0), or mask.float() if its values are weights"
        )
    shape = mask.shape
    # One by one: in a graph some of them are numbers and some symbols.
    alike = mask.dim() in (3, 4) and shape[0] == batch and (mask.dim() == 3 or shape[1] == 1)
    if not (alike and shape[-2] == size[0] and shape[-1] == size[1]):
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected {(batch, *size)} or "
            f"{(batch, 1, *size)}, the prediction's size, or that of a dense target; "
            f"{_way_out(mask, batch, size)}"
        )
    if mask.device != device:
        raise ValueError(f"mask: got device {mask.device}, expected {device}; use mask.to(...)")
    mask = savable(mask)
    seen = check_weights(mask, torch.float32)
    mask = mask if seen is None else mask + seen
    return mask if mask.dim() == 3 else mask.squeeze(1)  # what was one already stays the same


def _way_out(mask: Tensor, batch: int, size: tuple[int, int]) -> str:
    """How a mask of another shape becomes (N, H, W)."""
    shape = tuple(mask.shape)
    if shape[-2:] != size:
        return "resize it with mode='nearest'"
    if len(shape) == 4 and shape[0] == batch:
        reduced = "all(dim=1)" if mask.dtype == torch.bool else "amin(dim=1)"
        return f"a pixel counts for all classes: reduce it over them, such as mask.{reduced}"
    if len(shape) == 2:
        one = "one image: use mask.unsqueeze(0)"
        return one if batch == 1 else f"one mask for all images: use mask.expand({batch}, -1, -1)"
    if len(shape) in (3, 4) and shape[0] == 1:
        rest = ", ".join(["-1"] * (len(shape) - 1))
        return f"one mask for all images: use mask.expand({batch}, {rest})"
    return "give one mask for each image, sliced as the prediction is"


def restricted(mask: Tensor | None, counted: Tensor) -> Tensor:
    """A mask (N, H, W), of whose pixels only those `counted` (N, H, W) bool are left; these are
    among the mask's own."""
    if mask is None or mask.dtype == torch.bool:
        return counted
    return torch.where(counted, mask, 0)


def check_weights(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Hold the weights of a floating mask to what maps of `dtype` hold.

    Returns:
        As `check_same_mask`.

    Raises:
        ValueError: one is negative, not finite or too large; on CUDA only with
            ``GPL_FAST_CHECK=1``.
    """
    if mask is None or mask.dtype == torch.bool:
        return None
    narrow = dtype == torch.float16
    most = torch.finfo(dtype if narrow else torch.float32).max
    seen: Tensor = torch.ops.gpl_fast.check_weights(mask, most)
    return seen if torch.compiler.is_compiling() else None


def has_size(mask: Tensor | None, size: tuple[int, ...]) -> TypeGuard[Tensor]:
    """Whether this is a mask of maps of `size` (H, W)."""
    return isinstance(mask, Tensor) and mask.dim() in (3, 4) and tuple(mask.shape[-2:]) == size


def savable(mask: Tensor) -> Tensor:
    """A mask as a graph may save it, bool or float32: a copy of one made under
    `torch.inference_mode`."""
    if mask.dtype != torch.bool:
        mask = (mask.detach() if mask.requires_grad else mask).float()
    if torch.compiler.is_compiling() or not mask.is_inference():
        return mask
    return mask.clone()


def check_same_mask(given: Tensor, stored: Tensor | None, message: str) -> Tensor | None:
    """Hold a mask (N, H, W) to the one that stored features were made with; True is 1.

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


def _look_at_weights(mask: Tensor, most: float) -> Tensor:
    if values.may_look(mask):
        bad = ~((mask >= 0) & (mask <= most))
        if bool(bad.any()):
            limit = "" if most > 2**16 else f" and at most {most:.0f}, float16's largest number"
            raise ValueError(
                f"mask: got {int(bad.sum())} weights such as {mask[bad][:3].tolist()}, expected "
                f"finite ones >= 0{limit}; use mask.clamp(min=0), (mask > 0) where it only says "
                "which pixels count, or divide it by mask.max()"
            )
    return _no_weights(mask, most)


def _no_weights(mask: Tensor, most: float) -> Tensor:
    return mask.new_zeros((), dtype=torch.float32)


values.define("check_weights(Tensor mask, float most) -> Tensor", _look_at_weights, _no_weights)


def _look(given: Tensor, stored: Tensor, message: str) -> Tensor:
    if given.dtype != stored.dtype:  # a bool mask and its numbers are the same
        if stored.dtype != torch.bool:  # which a sharded model's cast of inputs may have rounded
            given = given.to(stored.dtype)
        given, stored = given.float(), stored.float()
    if values.may_look(given) and not torch.equal(given, stored):
        raise ValueError(message)
    return given.new_zeros((), dtype=torch.float32)


def _fake(given: Tensor, stored: Tensor, message: str) -> Tensor:
    return given.new_empty((), dtype=torch.float32)


values.define("check_same_mask(Tensor given, Tensor stored, str message) -> Tensor", _look, _fake)
