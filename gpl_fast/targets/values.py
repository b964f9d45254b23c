"""Operators that look at a target's values: ranges, signs, sums, maps that are activated already.

Operators, so that looking works inside torch.compile(fullgraph=True); defined by hand, because
`torch.library.custom_op` would import torch._dynamo at the first call: seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gpl_fast import environment

_LIBRARY: Any = torch.library.Library("gpl_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "check_labels(Tensor labels, Tensor? mask, int channels, int? ignore_index) -> Tensor"
)
_LIBRARY.define(
    "check_topk(Tensor values, Tensor indices, Tensor? mask, int channels, str rest)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "check_dense(Tensor target, Tensor? valid, str activation, bool holes, str what) -> Tensor"
)

_LIBRARY.define("check_same_mask(Tensor given, Tensor stored, str message) -> Tensor")

# A look at a dense target begins with about so many values and ends at the first pixel that no
# activation puts out, which of logits is mostly the first one of all.
FIRST_LOOK = 2**12
LARGEST_LOOK = 2**22


def _check_labels(
    labels: Tensor, mask: Tensor | None, channels: int, ignore_index: int | None
) -> Tensor:
    out = labels.to(torch.int64, copy=True, memory_format=torch.contiguous_format)
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
            + _way_out(channels)
        )
    return out.masked_fill_(wrong, -1)


def _way_out(channels: int) -> str:
    if channels == 1:
        return (
            " of a mask; use (labels > 0) for a mask of other values, .float() for a map of values "
            "such as depth, and ignore_index= or mask= only for pixels that do not count"
        )
    return "; pass ignore_index= for pixels that do not count, or mask="


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


def _check_dense(
    target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str
) -> Tensor:
    if may_look(target):
        refuse_dense(target, valid, activation, holes, what)
    return target.new_zeros((), dtype=torch.float32)


def refuse_dense(
    target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str
) -> None:
    """What `check_dense` refuses, wherever the target is: on a GPU this synchronises."""
    if holes and not all(bool(image.isfinite().all()) for image in target):
        raise ValueError(
            f"{what}: got NaN or infinite values in a map that is resized to the prediction's "
            "size, where they would spread to valid pixels, expected finite values, or a mask of "
            f"the target's own size, {tuple(target.shape[2:])}: what that leaves out is not "
            "resized; or resize the target to the prediction's size first"
        )
    if activation != "none" and holds_probabilities(target, valid, activation):
        sums = ", summing to 1 or 0 at each pixel, or only 0 and 1"
        raise ValueError(
            f"{what}: got values that are probabilities already (all in [0, 1]"
            f"{sums if activation == 'softmax' else ''}), expected logits, which "
            f"target_activation='auto' puts through the {activation}; say target_activation='none' "
            "if it holds probabilities, or 'same' if these really are logits"
        )


def holds_probabilities(target: Tensor, valid: Tensor | None, activation: str) -> bool:
    """Whether a map (N, C, h, w) holds, at every valid pixel, what `activation` may put out.

    Values in [0, 1] within ``2 eps``, which a resize may add; under softmax also sums that are 1
    within ``1e-3 + 2 eps`` or exactly 0, or 0 and 1 alone in the whole map. Nothing valid: False.
    """
    sums, bits, any_valid = activation == "softmax", activation == "softmax", False
    n, c, h, w = target.shape
    rounding = 2 * torch.finfo(target.dtype).eps
    wide = torch.float64 if target.dtype == torch.float64 else torch.float32
    rows = max(1, FIRST_LOOK // max(c * w, 1))
    for image in range(n):
        r0 = 0
        while r0 < h:
            y = target[image, :, r0 : r0 + rows].to(wide)
            keep = None if valid is None else valid[image, r0 : r0 + rows]
            any_valid = any_valid or keep is None or bool(keep.any())

            def everywhere(good: Tensor, keep: Tensor | None = keep) -> bool:
                return bool((good if keep is None else good | ~keep).all())

            if not everywhere(((y >= -rounding) & (y <= 1 + rounding)).all(dim=0)):
                return False
            if activation == "softmax":
                total = y.sum(dim=0)
                near = ((total - 1).abs() <= 1e-3 + rounding) | (total == 0)
                sums = sums and everywhere(near)
                bits = bits and everywhere(((y == 0) | (y == 1)).all(dim=0))
                if not (sums or bits):
                    return False
            r0 += rows
            rows = min(2 * rows, max(1, LARGEST_LOOK // max(c * w, 1)))
    return any_valid


def _check_same_mask(given: Tensor, stored: Tensor, message: str) -> Tensor:
    if may_look(given) and not torch.equal(given, stored):
        raise ValueError(message)
    return given.new_zeros((), dtype=torch.float32)


def _check_same_mask_fake(given: Tensor, stored: Tensor, message: str) -> Tensor:
    return given.new_empty((), dtype=torch.float32)


def _check_dense_fake(
    target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str
) -> Tensor:
    return target.new_empty((), dtype=torch.float32)


for _name, _run, _fake in (
    ("check_same_mask", _check_same_mask, _check_same_mask_fake),
    ("check_dense", _check_dense, _check_dense_fake),
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


def check_dense(
    target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str
) -> Tensor | None:
    """Look at a dense target (N, C, h, w) before it is resized and activated.

    Args:
        valid: (N, h, w) bool, the pixels that count; None = all.
        activation: that would be applied to it unasked: refuse what it put out already; "none" =
            do not look for that.
        holes: pixels are masked at another size: it must be finite.
        what: its name in an error.

    Returns:
        In a compiled graph a 0 that has to reach the result, or the graph would leave the look out;
        else None.

    Raises:
        ValueError: on the CPU; on CUDA only with ``GPL_FAST_CHECK=1``.
    """
    if activation == "none" and not holes:
        return None
    # An operator: modes and transforms, whose tensors have no values to look at, know what to do.
    seen: Tensor = torch.ops.gpl_fast.check_dense(target, valid, activation, holes, what)
    return seen if torch.compiler.is_compiling() else None


def check_same_mask(given: Tensor, stored: Tensor | None, message: str) -> Tensor | None:
    """Hold a mask (N, H, W) to the one that stored features were made with.

    Returns:
        As `check_dense`.

    Raises:
        ValueError: `message`; on CUDA, of masks that differ in values, only with
            ``GPL_FAST_CHECK=1``.
    """
    if stored is None or given.shape != stored.shape:
        raise ValueError(message)
    seen: Tensor = torch.ops.gpl_fast.check_same_mask(given, stored, message)
    return seen if torch.compiler.is_compiling() else None


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
    if t.is_meta:
        return False
    return t.device.type == "cpu" or environment.value("GPL_FAST_CHECK") == "1"
