"""Cross-entropy and the Generic Perceptual Loss in one module."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import SupportsFloat, SupportsIndex, Unpack

import torch
from torch import Tensor, nn

from gpl_fast import distance_maps, parts
from gpl_fast.costs import Explanation
from gpl_fast.device_copies import DeviceCopies
from gpl_fast.explain import explain_segmentation
from gpl_fast.input_checks import (
    as_class_weight,
    as_label_smoothing,
    as_num_classes,
    as_weight,
    check_gpl_ignore,
)
from gpl_fast.loss import GenericPerceptualLoss, GenericWords
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import refuse_unknown
from gpl_fast.targets import TargetFeatures, TargetLike, TargetMap, first_look

# `GenericWords`, in the order of the signature.
_KNOWN = [
    name
    for name in inspect.signature(GenericPerceptualLoss.__init__).parameters
    if name not in ("self", "in_channels", "ignore_index")
]


class SegmentationLoss(nn.Module):
    """``ce_weight · CE(x, labels) + gpl_weight · L(softmax(x), target)``: the paper's eq. (2).

    Args:
        num_classes: C >= 2.
        gpl_weight: λ; the paper uses 0.1.
        ce_weight: of the cross-entropy.
        ignore_index: label of pixels that do not count; "auto" = 255 where C <= 255; None = none.
        class_weight: (C,) of the cross-entropy: a tensor or a sequence of numbers.
        label_smoothing: of the cross-entropy, in [0, 1].
        gpl_ignore: whether pixels with an ignored label leave the perceptual term: "auto" = only
            when the labels are its target; True; False.
        return_parts: return ``{"loss_ce", "loss_gpl"}``, weighted, instead of their sum; the call's
            own word wins.
        **gpl: everything that `GenericPerceptualLoss` takes. A teacher that holds probabilities
            needs ``target_activation="none"``.

    Raises:
        TypeError, ValueError: an argument outside of what is listed.
    """

    def __init__(
        self,
        num_classes: SupportsIndex,
        *,
        gpl_weight: SupportsFloat = 0.1,
        ce_weight: SupportsFloat = 1.0,
        ignore_index: SupportsIndex | str | None = "auto",
        class_weight: Tensor | Iterable[SupportsFloat] | None = None,
        label_smoothing: SupportsFloat = 0.0,
        gpl_ignore: bool | str = "auto",
        return_parts: bool = False,
        **gpl: Unpack[GenericWords],
    ) -> None:
        super().__init__()
        num_classes = as_num_classes(num_classes)
        check_gpl_ignore(gpl_ignore)
        refuse_unknown("SegmentationLoss", gpl, _KNOWN)
        if isinstance(ignore_index, str) and ignore_index == "auto":
            if num_classes > 255:
                raise ValueError(
                    f"ignore_index: got 'auto' with {num_classes} classes, where 255 is a class; "
                    "expected an explicit label, such as 65535 or -1, or None = ignore nothing"
                )
            ignore_index = 255
        elif isinstance(ignore_index, str):
            raise ValueError(f"ignore_index: got {ignore_index!r}, expected 'auto', an int or None")
        self.gpl = GenericPerceptualLoss(num_classes, ignore_index=ignore_index, **gpl)
        self.gpl_weight = as_weight("gpl_weight", gpl_weight)
        self.ce_weight = as_weight("ce_weight", ce_weight)
        self.label_smoothing = label_smoothing
        self.gpl_ignore = gpl_ignore
        self.return_parts = return_parts
        # A plain attribute: a buffer would appear in state_dict and be broadcast by DDP.
        self.class_weight = (
            None if class_weight is None else as_class_weight(class_weight, num_classes)
        )
        self._copies = DeviceCopies()

    @property
    def label_smoothing(self) -> float:
        """Of the cross-entropy; kept as text, as `Options.texts`."""
        return float(self._label_smoothing)

    @label_smoothing.setter
    def label_smoothing(self, value: SupportsFloat) -> None:
        self._label_smoothing = repr(as_label_smoothing(value))

    @property
    def net(self) -> LossNet:
        """The frozen network of the perceptual term."""
        return self.gpl.net

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: TargetLike | None = None,
        mask: Tensor | None = None,
        return_parts: bool | None = None,
    ) -> Tensor | dict[str, Tensor]:
        """The total for `logits` (N, C, h, w); see `functional.segmentation_loss`."""
        found = parts.segmentation_parts(
            logits,
            labels,
            self.net,
            self.gpl.weights.on(logits),
            self.gpl.options,
            teacher=teacher,
            mask=mask,
            gpl_weight=self.gpl_weight,
            ce_weight=self.ce_weight,
            class_weight=self._copies.of("class_weight", self.class_weight, logits),
            label_smoothing=self.label_smoothing,
            gpl_ignore=self.gpl_ignore,
        )
        if not (torch.compiler.is_compiling() or self.gpl._looked):
            self.gpl._looked = first_look(self.gpl.options, teacher=(teacher, mask))
        wanted = self.return_parts if return_parts is None else return_parts
        return found if wanted else parts.sum_of_parts(found)

    def explain(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: TargetLike | None = None,
        mask: Tensor | None = None,
        architecture: str | None = None,
    ) -> Explanation:
        """Which backend would run and why, FLOPs, bytes saved, workspace; print it.

        Nothing is computed. Meta tensors stand for tensors of the default device; another
        `architecture` than theirs goes by its name, such as "sm_90" or "avx2".
        """
        return explain_segmentation(
            self,
            self.net,
            self.gpl.options,
            logits,
            labels,
            teacher,
            mask,
            taps=self.gpl.weights.on(logits),
            gpl_weight=self.gpl_weight,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            gpl_ignore=self.gpl_ignore,
            architecture=architecture,
        )

    def encode(self, teacher: TargetMap, mask: Tensor | None = None) -> TargetFeatures:
        """φ(teacher), to be used as `teacher`; see `functional.encode`."""
        return self.gpl.encode(teacher, mask)

    def distance_map(
        self,
        logits: Tensor,
        labels: Tensor,
        teacher: TargetLike | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`GenericPerceptualLoss.distance_map` of the perceptual term, (N, 1, H, W) of the labels'
        size, without `gpl_weight`."""
        weights = distance_maps.last_layer(self.gpl.weights.on(logits), self.net)
        return distance_maps.segmentation_map(
            logits,
            labels,
            teacher,
            mask,
            self.net,
            weights,
            self.gpl.options,
            gpl_ignore=self.gpl_ignore,
        )

    def fingerprint(self) -> str:
        """Hex digest of the network's structure and weights: the same on every machine."""
        return self.gpl.fingerprint()

    def extra_repr(self) -> str:
        usual = {"gpl_weight": 0.1, "ce_weight": 1.0, "label_smoothing": 0.0, "gpl_ignore": "auto"}
        weights = None if self.class_weight is None else self.class_weight.tolist()
        words = {name: getattr(self, name) for name in usual}
        words["return_parts"], usual["return_parts"] = self.return_parts, False
        changed = [f"{k}={v!r}" for k, v in words.items() if v != usual[k] or k == "gpl_weight"]
        return ", ".join([*changed, *([] if weights is None else [f"class_weight={weights}"])])
