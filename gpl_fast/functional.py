"""The losses as plain functions: check the words, and compute (`gpl_fast.parts`).

`gpl_fast.GenericPerceptualLoss`, `SegmentationLoss` and `PerceptualLoss` are thin modules that hold
words which are checked once. Conventions: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

from torch import Tensor

from gpl_fast import parts
from gpl_fast.input_checks import Number
from gpl_fast.layer_weights import LayerWeight, as_layers, level_taps
from gpl_fast.net.lossnet import LossNet
from gpl_fast.normalizer import NormalizerLike
from gpl_fast.options import Options, OptionWords
from gpl_fast.targets import TargetFeatures, TargetLike
from gpl_fast.terms import ClassWeight, Segmentation, activation_of


def generic_perceptual_loss(
    pred: Tensor,
    target: TargetLike,
    net: LossNet,
    *,
    mask: Tensor | None = None,
    level_weights: Iterable[LayerWeight] | None = None,
    **options: Unpack[OptionWords],
) -> Tensor:
    """``Σ_b w_b / (C_b H_b W_b) ‖E'_b − E_b‖²`` over the levels b of a frozen network.

    Args:
        pred: (N, C, H, W) floating.
        target: floating (N, C, h, w), integer labels (N, H, W) or (N, 1, H, W), `TopK`, or
            `TargetFeatures`. Never gets a gradient.
        net: the frozen network, ``net.in_channels == C``.
        mask: (N, H, W) or (N, 1, H, W): bool, True = valid, or floating, the weight m >= 0 of each
            pixel, by which both maps are multiplied (the squared distance grows as m²); of a dense
            target of another size also (N, h, w): that is then resized with what is valid alone.
        level_weights: one for each block, a number or one for each of its channels; None = the
            last block only, weight 1.
        **options: see `OptionWords`. A dense target that holds probabilities is refused under
            ``target_activation="auto"``, as `GenericPerceptualLoss` says; on a GPU only with
            ``GPL_FAST_CHECK=1``.

    Shape:
        `pred` (N, C, H, W) and a target as above -> 0-dim, or (N,) with ``reduction="none"``;
        float32, float64 for float64 input.

    Raises:
        TypeError, ValueError: bad input, with what was got, expected, and the way out.
        BackendUnavailable: ``backend="fast"`` where it cannot run.

    Source:
        docs/math.md, eq. (1); Liu et al., CVPR 2021, eq. (1) and Section 3.1.
    """
    o = Options.of("generic_perceptual_loss", options)
    o.check_channels(net.in_channels)
    weights = level_taps(net, level_weights, o.distance)
    return parts.generic_value(pred, target, mask, net, weights, o)


def segmentation_loss(
    logits: Tensor, labels: Tensor, net: LossNet, *,
    teacher: TargetLike | None = None, mask: Tensor | None = None,
    gpl_weight: Number = 0.1, ce_weight: Number = 1.0,
    class_weight: ClassWeight | None = None,
    mode: str = "multiclass",
    pos_weight: ClassWeight | None = None,
    label_smoothing: Number = 0.0,
    gpl_ignore: bool | str = "auto",
    level_weights: Iterable[LayerWeight] | None = None,
    return_parts: bool = False,
    normalizer: NormalizerLike | None = None,
    **options: Unpack[OptionWords],
) -> Tensor | dict[str, Tensor]:  # fmt: skip
    """``ce_weight · CE(x, labels) + gpl_weight · L(softmax(x), target)``.

    Args:
        logits: (N, C, h, w) floating; resized bilinearly to the labels' size if smaller.
        labels: (N, H, W) or (N, 1, H, W) integer; in mode "multilabel" (N, C, H, W).
        net: the frozen network, ``net.in_channels == C``.
        teacher: what `generic_perceptual_loss` takes as a target; None = the labels.
        mask: (N, H, W) or (N, 1, H, W), bool or weights m, for both terms: ``Σ m w ℓ / Σ m w``.
        gpl_weight, ce_weight: of the two terms; a term of weight 0 is not computed.
        class_weight: (C,) of the cross-entropy, as ``F.cross_entropy(weight=)``. Where the weights
            of all counted pixels are 0, so is the cross-entropy.
        mode, pos_weight: see `SegmentationLoss`; in "binary" and "multilabel" the cross-entropy is
            a binary one with logits and ``activation`` "sigmoid".
        label_smoothing: of the cross-entropy, in [0, 1].
        gpl_ignore: whether pixels with an ignored label leave the perceptual term: "auto" = only
            when the labels are its target; True; False (such a label is then a zero map).
        level_weights: see `generic_perceptual_loss`.
        return_parts: return ``{"loss_ce", "loss_gpl"}``, weighted, instead of their sum.
        normalizer: of a batch in pieces, what the sums are divided by: its pixels that count (with
            class weights the sum of these), or (pixels, images): numbers, 0-dim tensors, or what
            `SegmentationLoss.count` adds up to. Without images the perceptual term stays a mean.
        **options: see `OptionWords`.

    Shape:
        Of `logits` (N, C, h, w) and the others as above; each value as `generic_perceptual_loss`.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `generic_perceptual_loss`.

    Source:
        docs/math.md, section 5; Liu et al., CVPR 2021, eq. (2).
    """
    terms = Segmentation.of(
        net.in_channels, look=False, gpl_weight=gpl_weight, ce_weight=ce_weight,
        class_weight=class_weight, label_smoothing=label_smoothing, gpl_ignore=gpl_ignore,
        mode=mode, pos_weight=pos_weight,
    )  # fmt: skip
    options["activation"] = activation_of(mode, options.get("activation"))
    o = Options.of("segmentation_loss", options)
    o.check_channels(net.in_channels)
    found = parts.segmentation_parts(
        logits, labels, net, level_taps(net, level_weights, o.distance), o, terms,
        teacher=teacher, mask=mask, normalizer=normalizer,
    )  # fmt: skip
    return found if return_parts else parts.sum_of_parts(found)


def perceptual_loss(
    pred: Tensor,
    target: TargetLike,
    net: LossNet,
    *,
    style_target: TargetLike | None = None,
    mask: Tensor | None = None,
    feature_layers: Mapping[str, LayerWeight],
    style_layers: Mapping[str, Number],
    tv_weight: Number = 0.0,
    return_parts: bool = False,
    **options: Unpack[OptionWords],
) -> Tensor | dict[str, Tensor]:
    """Feature reconstruction, style and total variation.

    Args:
        pred: (N, C, H, W) floating.
        target: as in `generic_perceptual_loss`.
        net: any network with the layers named.
        style_target: like `target`, of any size, for N images or one; None = `target`.
        mask: as in `generic_perceptual_loss`, for `pred` and `target`.
        feature_layers: weight of ``‖φ' − φ‖² / (C H W)`` by layer, a number or one for each
            channel.
        style_layers: weight of ``‖G' − G‖_F²`` by layer.
        tv_weight: of the mean squared neighbour difference of the activated prediction.
        return_parts: return ``{"loss_feature", "loss_style", "loss_tv"}``, weighted.
        **options: see `OptionWords`; ``activation`` is "none" by default here.

    Shape:
        Of `pred` (N, C, H, W) and the others as above; each value as `generic_perceptual_loss`.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `generic_perceptual_loss`.

    Source:
        docs/math.md, section 3; Johnson et al., ECCV 2016, Section 3.2, eq. (2) to (4).
    """
    o = Options.of("perceptual_loss", options, activation="none")
    o.check_channels(net.in_channels)
    weights, tv = as_layers(net, feature_layers, style_layers, tv_weight, o.distance)
    found = parts.perceptual_parts(
        pred, target, net, o,
        style_target=style_target, mask=mask, weights=weights, tv_weight=tv,
    )  # fmt: skip
    return found if return_parts else parts.sum_of_parts(found)


def encode(
    target: TargetLike,
    net: LossNet,
    layers: Sequence[str],
    *,
    mask: Tensor | None = None,
    **options: Unpack[OptionWords],
) -> TargetFeatures:
    """φ(target) at `layers`, to be used as a target any number of times.

    In float32 (float64 for a float64 target) unless ``compute_dtype`` says otherwise: the
    difference of stored features cannot be computed in the difference form.

    Args:
        target: floating (N, C, H, W), integer labels or `TopK`.
        net: the frozen network.
        layers: whose outputs are kept.
        mask: (N, H, W) or (N, 1, H, W), bool or floating; a copy is kept with the features.
        **options: see `OptionWords`.

    Shape:
        A target as above -> `TargetFeatures` of (N, C_b, H_b, W_b) for each layer.

    Raises:
        TypeError, ValueError, BackendUnavailable: as `generic_perceptual_loss`; TypeError also of
            `TargetFeatures`, which are encoded already.

    Source:
        docs/math.md, sections 1 and 2, ``E_b``; Liu et al., CVPR 2021, Section 3.1.
    """
    return parts.encode_target(target, mask, net, layers, Options.of("encode", options))
