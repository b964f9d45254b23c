"""How much each part of a loss weighs in its gradient, measured on a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from gpl_fast import parts
from gpl_fast.input_checks import Number, as_float
from gpl_fast.net.lossnet import LossNet
from gpl_fast.options import Options
from gpl_fast.precision import accumulation_dtype
from gpl_fast.targets import TargetFeatures, TargetLike
from gpl_fast.terms import Segmentation, Weights

Parts = Callable[[Tensor, Options], Mapping[str, Tensor]]


@torch.inference_mode(False)  # whose tensors no graph could save
@torch.enable_grad()
def gradient_norms(
    parts_of: Parts, pred: Tensor, o: Options, target: TargetLike | None, asked: str = "ratio"
) -> dict[str, float]:
    """L2 norm of the gradient of each part by `pred` (N, C, H, W), with reduction "mean".

    A prediction in half precision is widened, as these gradients are below its smallest numbers;
    the network computes in its dtype all the same.

    Args:
        parts_of: the weighted parts of a prediction, 0-dim each.
        o: the loss' options.
        target: what the perceptual term is compared with.
        asked: who wants to know, for an error.
    """
    if pred.is_meta:
        way_out = "leave ratio= out" if asked == "ratio" else "use explain"
        raise ValueError(
            f"{asked}: got a prediction on 'meta', expected one that holds values: norms of "
            f"gradients are measured; {way_out} to plan a call"
        )
    wide = accumulation_dtype(pred.dtype)
    own = None if isinstance(target, TargetFeatures) or wide == pred.dtype else pred.dtype
    o = replace(o, reduction="mean", compute_dtype=o.compute_dtype or own)
    leaf = pred.detach().to(wide, copy=True).requires_grad_()
    norms = dict.fromkeys(found := parts_of(leaf, o), 0.0)
    for name, part in found.items():
        if part.requires_grad:
            (grad,) = torch.autograd.grad(part, leaf, retain_graph=True)
            norms[name] = float(torch.linalg.vector_norm(grad, dtype=torch.float64))
    return norms


def segmentation_norms(
    logits: Tensor,
    labels: Tensor,
    net: LossNet,
    taps: Weights,
    o: Options,
    s: Segmentation,
    *,
    teacher: TargetLike | None,
    mask: Tensor | None,
    asked: str = "ratio",
) -> dict[str, float]:
    """`gradient_norms` of `parts.segmentation_parts`."""

    def parts_of(x: Tensor, o: Options) -> dict[str, Tensor]:
        return parts.segmentation_parts(x, labels, net, taps, o, s, teacher=teacher, mask=mask)

    return gradient_norms(parts_of, logits, o, teacher, asked)


def ratios(norms: Mapping[str, float], weights: Mapping[str, object]) -> dict[str, float]:
    """Of each part's norm to the first one's, infinite where that one is 0: of the parts that have
    `weights`, which the others, of a loss that leaves them out, do not."""
    (_, one), *others = ((name, norm) for name, norm in norms.items() if weights[name])
    return {name: norm / one if one else float("inf") for name, norm in others}


def weight_for(share: Number, ce: float, gpl: float) -> float:
    """λ at which a gradient of norm `gpl` has `share` of `ce`, the cross-entropy's.

    Raises:
        ValueError: a share that is not > 0; norms of which there is no ratio.
    """
    part = as_float("share", share, "a number > 0")
    if part <= 0:
        raise ValueError(f"share: got {part}, expected a number > 0")
    for norm, term, why in (
        (ce, "cross-entropy", "ce_weight is 0, no pixel counts, or every label is met exactly"),
        (gpl, "perceptual term", "no pixel counts, or the prediction equals the target"),
    ):
        if not 0 < norm < float("inf"):
            raise ValueError(
                f"suggest_weight: got a gradient of norm {norm} of the {term}, expected a number "
                f"> 0; it is 0 where {why}: use a batch of the training data"
            )
    return part * ce / gpl
