"""Cross-entropy and the Generic Perceptual Loss in one module."""

from __future__ import annotations

import inspect
from typing import Unpack

import torch
from torch import Tensor, nn

from gpl_fast import distance_maps, parts
from gpl_fast.balance import segmentation_norms, weight_for
from gpl_fast.costs import Explanation
from gpl_fast.device_copies import DeviceCopies
from gpl_fast.explain import explain_segmentation
from gpl_fast.input_checks import Integer, Number, as_label_smoothing, as_num_classes
from gpl_fast.loss import GenericPerceptualLoss, GenericWords
from gpl_fast.net.lossnet import LossNet
from gpl_fast.normalizer import NormalizerLike
from gpl_fast.options import IgnoreIndex, as_ignore_index, refuse_unknown
from gpl_fast.targets import TargetFeatures, TargetLike, TargetMap, first_look
from gpl_fast.terms import ClassWeight, Segmentation, activation_of

# `GenericWords`, in the order of the signature.
_KNOWN = [
    name
    for name in inspect.signature(GenericPerceptualLoss.__init__).parameters
    if name not in ("self", "in_channels", "ignore_index")
]


class SegmentationLoss(nn.Module):
    """``ce_weight · CE(x, labels) + gpl_weight · L(softmax(x), target)``.

    Args:
        num_classes: C >= 2; 1 in mode "binary".
        mode: "multiclass" = one class a pixel; "binary" and "multilabel" = labels (N, C, H, W) of
            0, 1 and ignored ones, of one class (N, H, W) too, bool, integers or floating: the
            binary cross-entropy with logits, a mean over the elements that count, beside the
            perceptual term of sigmoids. An ignored element is 0 in both maps at that element alone.
        gpl_weight: λ; the paper uses 0.1.
        ce_weight: of the cross-entropy.
        ignore_index: label of pixels that do not count, or several; "auto" = 255 where C <= 255;
            None = none.
        class_weight: (C,) of the cross-entropy: a tensor or a sequence of numbers.
        pos_weight: (C,), (C, 1, 1), or one number for all classes, of what is labelled 1, of a
            binary cross-entropy; its class_weight too.
        label_smoothing: of the cross-entropy, in [0, 1]; of a binary one ``y (1 − ε) + ε / 2``.
        gpl_ignore: whether pixels with an ignored label leave the perceptual term: "auto" = only
            when the labels are its target; True; False.
        return_parts: return ``{"loss_ce", "loss_gpl"}``, weighted, instead of their sum; the call's
            own word wins.
        **gpl: everything that `GenericPerceptualLoss` takes. A teacher that holds probabilities
            needs ``target_activation="none"``.

    Shape:
        As `functional.segmentation_loss`: (N, C, h, w) and labels (N, H, W) -> 0-dim or (N,).

    Raises:
        TypeError, ValueError: an argument outside of what is listed.

    Source:
        docs/math.md, section 5 (of single elements eq. (8)); Liu et al., CVPR 2021, eq. (2).
    """

    def __init__(
        self, num_classes: Integer, *,
        mode: str = "multiclass",
        gpl_weight: Number = 0.1, ce_weight: Number = 1.0,
        ignore_index: IgnoreIndex | str = "auto",
        class_weight: ClassWeight | None = None, pos_weight: ClassWeight | None = None,
        label_smoothing: Number = 0.0, gpl_ignore: bool | str = "auto",
        return_parts: bool = False,
        **gpl: Unpack[GenericWords],
    ) -> None:  # fmt: skip
        super().__init__()
        num_classes = as_num_classes(num_classes, mode)
        refuse_unknown("SegmentationLoss", gpl, _KNOWN)
        gpl["activation"] = activation_of(mode, gpl.get("activation"))
        checked = Segmentation.of(
            num_classes, gpl_weight=gpl_weight, ce_weight=ce_weight, class_weight=class_weight,
            label_smoothing=label_smoothing, gpl_ignore=gpl_ignore, mode=mode,
            pos_weight=pos_weight,
        )  # fmt: skip
        ignored = as_ignore_index(ignore_index, num_classes, checked.by_element)
        self.gpl = GenericPerceptualLoss(num_classes, ignore_index=ignored, **gpl)
        self.gpl_weight, self.ce_weight = checked.gpl_weight, checked.ce_weight
        self.label_smoothing, self.gpl_ignore = checked.label_smoothing, checked.gpl_ignore
        # A plain attribute: a buffer would appear in state_dict and be broadcast by DDP.
        self.class_weight, self.pos_weight = checked.class_weight, checked.pos_weight
        self.mode, self.return_parts = mode, return_parts
        self._copies = DeviceCopies()

    @property
    def label_smoothing(self) -> float:
        """Of the cross-entropy; kept as text, as `Options.texts`."""
        return float(self._label_smoothing)

    @label_smoothing.setter
    def label_smoothing(self, value: Number) -> None:
        self._label_smoothing = repr(as_label_smoothing(value))

    @property
    def net(self) -> LossNet:
        """The frozen network of the perceptual term."""
        return self.gpl.net

    def forward(
        self, logits: Tensor, labels: Tensor, teacher: TargetLike | None = None,
        mask: Tensor | None = None, return_parts: bool | None = None,
        normalizer: NormalizerLike | None = None,
    ) -> Tensor | dict[str, Tensor]:  # fmt: skip
        """The total, with the words of this module.

        Shape:
            As `functional.segmentation_loss`.
        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.segmentation_loss`.
        """
        found = parts.segmentation_parts(
            logits, labels, self.net, self.gpl.weights.on(logits), self.gpl.options,
            self._terms(logits), teacher=teacher, mask=mask, normalizer=normalizer,
        )  # fmt: skip
        if not (torch.compiler.is_compiling() or self.gpl._looked):
            self.gpl._looked = first_look(self.gpl.options, teacher=(teacher, mask))
        wanted = self.return_parts if return_parts is None else return_parts
        return found if wanted else parts.sum_of_parts(found)

    def _terms(self, like: object) -> Segmentation:
        """With the class weights on the device of `like`."""
        weight = self._copies.of("class_weight", self.class_weight, like)
        of_ones = self._copies.of("pos_weight", self.pos_weight, like)
        return Segmentation(
            self.gpl_weight, self.ce_weight, weight, self.label_smoothing, self.gpl_ignore,
            self.mode, of_ones,
        )  # fmt: skip

    @torch.no_grad()
    def count(self, labels: Tensor, mask: Tensor | None = None) -> Tensor:
        """What these labels add to a `normalizer`: the pixels that count (with class weights the
        sum of their weights), and the images.

        Gradient accumulation: ``normalizer = sum(loss.count(y) for y in micro_batches)`` makes the
        sum of the pieces' values, and of their gradients, those of the whole batch. With DDP, which
        averages gradients, all-reduce it and divide it by the number of ranks.

        Shape:
            `labels` and `mask` of `functional.segmentation_loss` -> (2,) float64 on their device.
        Raises:
            TypeError, ValueError: as `forward` of these two.
        """
        s = self._terms(labels)
        return parts.count(labels, mask, self.net.in_channels, self.gpl.options, s)

    def suggest_weight(
        self, logits: Tensor, labels: Tensor, teacher: TargetLike | None = None,
        mask: Tensor | None = None, share: Number = 0.1,
    ) -> float:  # fmt: skip
        """The `gpl_weight` at which the perceptual term's gradient by these logits has `share` of
        the norm of the cross-entropy's, both with reduction "mean".

        Some batches of a network that has begun to learn say more than one of an untrained one.
        Works under `torch.no_grad` and `torch.inference_mode`, and synchronises with a GPU.

        Shape:
            As `forward` -> a Python number.
        Raises:
            TypeError, ValueError, BackendUnavailable: as `forward`; a gradient that is 0 or not
                finite, "meta" tensors, or a share that is not > 0.
        """
        norms = segmentation_norms(
            logits, labels, self.net, self.gpl.weights.on(logits), self.gpl.options,
            self._terms(logits)._replace(gpl_weight=1.0), teacher=teacher, mask=mask,
            asked="suggest_weight",
        )  # fmt: skip
        return weight_for(share, norms["loss_ce"], norms["loss_gpl"])

    def explain(
        self, logits: Tensor, labels: Tensor, teacher: TargetLike | None = None,
        mask: Tensor | None = None, architecture: str | None = None, ratio: bool = False,
    ) -> Explanation:  # fmt: skip
        """Which backend would run and why, FLOPs, bytes saved, workspace; print it.

        Nothing is computed. Meta tensors stand for tensors of the default device; another
        `architecture` than theirs goes by its name, such as "sm_90" or "avx2". With `ratio`, what
        norm the perceptual term's gradient has beside the cross-entropy's, which is computed.

        Shape:
            As `forward`; of "meta" tensors too, without `ratio`.
        Raises:
            TypeError, ValueError, BackendUnavailable: as `forward`; an unknown `architecture`.
        """
        return explain_segmentation(
            self, self.net, self.gpl.options, self._terms(logits), logits, labels,
            teacher=teacher, mask=mask, taps=self.gpl.weights.on(logits),
            architecture=architecture, ratio=ratio,
        )  # fmt: skip

    def encode(self, teacher: TargetMap, mask: Tensor | None = None) -> TargetFeatures:
        """φ(teacher), to be used as `teacher`.

        Shape:
            As `functional.encode`.
        Raises:
            TypeError, ValueError, BackendUnavailable: as `functional.encode`.
        """
        return self.gpl.encode(teacher, mask)

    def distance_map(
        self, logits: Tensor, labels: Tensor, teacher: TargetLike | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`GenericPerceptualLoss.distance_map` of the perceptual term, without `gpl_weight`.

        Shape:
            As `forward` -> (N, 1, H, W) of the labels' size.
        Raises:
            TypeError, ValueError: as `forward`.
        """
        weights = distance_maps.last_layer(self.gpl.weights.on(logits), self.net)
        return distance_maps.segmentation_map(
            logits, labels, self.net, weights, self.gpl.options, self._terms(logits),
            teacher=teacher, mask=mask,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Hex digest of the network's structure and weights: the same on every machine."""
        return self.gpl.fingerprint()

    def extra_repr(self) -> str:
        return _words(self)


def _words(loss: SegmentationLoss) -> str:
    """What differs from the defaults, and the weights."""
    usual = {"gpl_weight": 0.1, "ce_weight": 1.0, "label_smoothing": 0.0, "gpl_ignore": "auto"}
    usual["mode"] = "multiclass"
    tensors = {"class_weight": loss.class_weight, "pos_weight": loss.pos_weight}
    weights = [f"{k}={w.tolist()}" for k, w in tensors.items() if w is not None]
    words = {name: getattr(loss, name) for name in usual}
    words["return_parts"], usual["return_parts"] = loss.return_parts, False
    changed = [f"{k}={v!r}" for k, v in words.items() if v != usual[k] or k == "gpl_weight"]
    return ", ".join([*changed, *weights])
