"""Dense maps: logits, probabilities, depth; of any size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gpl_fast import reference
from gpl_fast.input_checks import FLOAT_DTYPES, way_out_of_shape
from gpl_fast.options import Options
from gpl_fast.targets import values
from gpl_fast.targets.masks import has_size, normalise_mask, restricted
from gpl_fast.targets.target import Target, check_like

# A look at a dense target begins with about so many values and ends at the first pixel that no
# activation puts out, which of logits is mostly the first one of all.
FIRST_LOOK = 2**12
LARGEST_LOOK = 2**22
# Values of one look at whether a map is finite.
FINITE_LOOK = 2**18


@dataclass(frozen=True)
class DenseTarget(Target):
    """A floating map (N, C, h, w), activated after a resize to the prediction's size."""

    kind = "dense"

    dense: Tensor  # (N, C, h, w) as given
    dense_valid: Tensor | None  # (N, h, w), the mask of its own size if it is resized

    @classmethod
    def takes(cls, given: object) -> bool:
        return isinstance(given, Tensor)

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
        assert isinstance(given, Tensor)
        _check_shape(given, channels, what)
        check_like(given, what, pred)
        target = given.detach()
        like = target if pred is None else pred
        size = (like.shape[2], like.shape[3])
        own = (target.shape[2], target.shape[3])
        n, device = target.shape[0], target.device
        resized = own != size
        own_valid: Tensor | None = None
        if resized and has_size(mask, own):
            own_valid = normalise_mask(mask, n, own, device)
            assert own_valid is not None
            own_valid = restricted(own_valid, reference.counted(own_valid))  # else none of a mean
            valid: Tensor | None = reference.resize_mask(own_valid, size)
        else:
            valid = normalise_mask(mask, n, size, device)
        holes = resized and valid is not None and own_valid is None
        seen = check_dense(target, own_valid if resized else valid, _unasked(o), holes, what)
        return cls(size, valid, target, own_valid, resized=resized, seen=seen)

    @property
    def data(self) -> Tensor:
        return self.dense

    def map(self, activation: str, temperature: float, dtype: torch.dtype) -> Tensor:
        y = reference.resize(self.dense.to(dtype), self.size, self.dense_valid)
        if activation == "softmax" and self.resized:
            y = y.clamp(min=torch.finfo(dtype).min)  # a mean may round to -inf
        y = reference.zero_invalid(y, self.valid)
        return reference.zero_invalid(reference.activate(y, activation, temperature), self.valid)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        tensors = super().tensors(dtype)
        tensors["dense"] = self.dense
        if self.dense_valid is not None:
            tensors["dense_valid"] = self.dense_valid
        return tensors


def first_look(o: Options, **targets: tuple[object, Tensor | None]) -> bool:
    """Refuse targets (by name: target, mask) that hold probabilities, on a device where calls do
    not look: the one synchronisation of a loss' first call. Whether there was one to look at.

    Raises:
        ValueError: as `check_dense`.
    """
    looked = False
    for what, (t, mask) in targets.items():
        if not isinstance(t, Tensor) or not t.is_floating_point() or t.is_meta:
            continue
        if values.may_look(t) or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
            continue
        valid = mask.reshape(-1, *t.shape[2:]) if has_size(mask, tuple(t.shape[2:])) else None
        refuse_dense(t, valid, _unasked(o), False, what)
        looked = True
    return looked


def check_dense(
    target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str
) -> Tensor | None:
    """Look at a dense target (N, C, h, w) before it is resized and activated.

    Args:
        valid: (N, h, w), the pixels that count; None = all.
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


def refuse_dense(
    target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str
) -> None:
    """What `check_dense` refuses, wherever the target is: on a GPU this synchronises."""
    if holes and not all_finite(target):
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


def all_finite(target: Tensor) -> bool:
    """Whether a map (N, C, h, w) is, a few rows at a time: looking at all of it at once would take
    as much memory again."""
    n, c, h, w = target.shape
    rows = max(1, FINITE_LOOK // max(c * w, 1))
    return all(
        bool(target[i, :, r : r + rows].isfinite().all())
        for i in range(n)
        for r in range(0, h, rows)
    )


def holds_probabilities(target: Tensor, valid: Tensor | None, activation: str) -> bool:
    """Whether a map (N, C, h, w) holds, at every valid pixel, what `activation` may put out.

    Values in [0, 1] within ``2 eps``, which a resize may add; under softmax also sums that are 1
    within ``1e-3 + 2 eps`` or exactly 0, or 0 and 1 alone in the whole map. Nothing valid: False.
    """
    valid = None if valid is None else reference.counted(valid)
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


def _check_shape(target: Tensor, channels: int, what: str) -> None:
    if target.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{what}: got {target.dtype}, expected floating maps of {FLOAT_DTYPES} or integer "
            "labels; use .float() or .long()"
        )
    shape = tuple(target.shape)
    if channels > 1 and (target.dim() == 3 or (target.dim() == 4 and shape[1] == 1)):
        raise ValueError(
            f"{what}: got {target.dtype} {shape}, expected floating maps (N, {channels}, h, w) or "
            "integer labels (N, H, W); labels must be integers: use labels.long()"
        )
    if target.dim() != 4 or shape[1] != channels:
        way_out = way_out_of_shape(target, channels)
        if target.dim() == 4 and shape[3] != channels:
            way_out = (
                "map a teacher of other classes to the student's first, such as "
                "teacher[:, [class of each student class]]"
            )
        raise ValueError(
            f"{what}: got shape {shape}, expected (N, {channels}, h, w), the prediction's "
            f"channels; {way_out}"
        )
    if min(shape[2:]) < 1:
        raise ValueError(f"{what}: got an empty map {shape}, expected (N, {channels}, h, w)")


def _unasked(o: Options) -> str:
    """The activation that a dense target gets without having been asked for."""
    return o.target if o.target_activation == "auto" else "none"


def _look(target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str) -> Tensor:
    if values.may_look(target):
        refuse_dense(target, valid, activation, holes, what)
    return target.new_zeros((), dtype=torch.float32)


def _fake(target: Tensor, valid: Tensor | None, activation: str, holes: bool, what: str) -> Tensor:
    return target.new_empty((), dtype=torch.float32)


values.define(
    "check_dense(Tensor target, Tensor? valid, str activation, bool holes, str what) -> Tensor",
    _look,
    _fake,
)
