"""The autograd Function around the fast path.

Saved between forward and backward (docs/derivation.md, section 4; `Plan.saved` gives the shapes):

=========== ======================================= ============= ==================================
``x``       (N, C, H, W), the caller's own          caller's      softmax / sigmoid backward
``lse``     (N, H, W)                               float32       softmax backward recomputes y'
``code.b``  (N, H_b, W_b, ceil(C_b / 2)), 4 bits    uint8         max pool + ReLU backward
``mask.b``  (N, H, W, ceil(C / 8)), 1 bit           uint8         ReLU backward without a max pool
``diff.b``  (N, H_b, W_b, C_b)                      compute dtype seed of eq. (2)
``phi.t``   style taps: (N, H_t, W_t, C_t)          compute dtype Gram gradient
``gram.t``  style taps: G' − G, (N, C_t, C_t)       float32       Gram gradient
``ce_lse``  cross-entropy: (N, H, W)                float32       where its temperature differs
``labels``  cross-entropy: (N, H, W)                int16 / 32    cross-entropy's gradient
``valid``   (N, H, W)                               bool          where pixels do not count
=========== ======================================= ============= ==================================

``lse`` is max + T log Σ e^((x − max) / T), in the logits' own units; y' = e^((x − lse) / T) over
its sum.

Both walks are one operator each, opaque to torch.compile: they loop over chunks that are chosen
from the shapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpl_fast import chain, plan, reference
from gpl_fast.graphs import constant_in_graphs
from gpl_fast.net.lossnet import LossNet
from gpl_fast.targets import Target

_LIBRARY: Any = torch.library.Library("gpl_fast", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    "perceptual_fwd(Tensor x, Tensor[] target, Tensor[] packs, str spec, str names, bool keep)"
    " -> (Tensor, Tensor[])"
)
_LIBRARY.define(
    "perceptual_bwd(Tensor x, Tensor[] target, Tensor[] packs, Tensor[] saved, Tensor g, str spec,"
    " str names) -> Tensor"
)

# What the backward reads of the target.
_KEPT = ("valid", "ce_labels", "class_weight")


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy that shares the passes over the logits.

    ``labels`` (N, H, W) int64 with -1 = does not count, ``class_weight`` (C,) float32 or None.
    """

    labels: Tensor
    class_weight: Tensor | None
    label_smoothing: float


def perceptual_terms(
    pred: Tensor,
    target: Target,
    net: LossNet,
    *,
    feature_weights: Mapping[str, float],
    style_weights: Mapping[str, float],
    style_features: Mapping[str, Tensor],
    activation: str,
    target_activation: str,
    temperature: float,
    dtype: torch.dtype,
    workspace_mb: float | str,
    cross_entropy: CrossEntropy | None = None,
) -> Tensor:
    """(4, N) float32: feature term, style term, Σ of the pixels' cross-entropy, Σ of its weights.

    Args:
        pred: (N, C, H, W) float32, bfloat16 or float16, any strides.
        style_features: by layer, (1 or N, C_b, h, w), where they are not to be made of `target`.
        dtype: what the chain computes in.
        Others: as `functional`.

    Raises:
        NotImplementedError: inside a transform of `torch.func`, or forward-mode differentiation.
    """
    refuse_transforms(pred)
    tensors = target.tensors(dtype)
    for name in style_weights:
        if name in style_features:
            tensors[f"gram.{name}"] = reference.gram(style_features[name].detach().float())
    if cross_entropy is not None:
        if tensors.get("labels") is cross_entropy.labels:
            # torch.compile takes no tensor twice, so one entry carries both names.
            tensors["labels+ce_labels"] = tensors.pop("labels")
        else:
            tensors["ce_labels"] = cross_entropy.labels
        if cross_entropy.class_weight is not None:
            tensors["class_weight"] = cross_entropy.class_weight.float()
    arithmetic = chain.arithmetic(pred.device, dtype)
    megabytes, hard = workspace(pred.device, workspace_mb)
    spec = plan.make_spec(
        net,
        feature_weights=feature_weights,
        style_weights=style_weights,
        kind=target.kind,
        resized=target.resized,
        activation=activation,
        target_activation=target_activation,
        temperature=temperature,
        label_smoothing=cross_entropy.label_smoothing if cross_entropy else 0.0,
        cross_entropy=cross_entropy is not None,
        device=pred.device.type,
        dtype=dtype,
        arithmetic=arithmetic,
        workspace_mb=megabytes,
        hard=hard,
    )
    names = tuple(tensors)
    weights = torch.float32 if arithmetic == "float32" else dtype
    packed = pred.device, weights, target.listed
    packs = net.cached_packs(*packed)
    text = ",".join(names) + ";" + ",".join(chain.pack_names(net, *packed))
    if torch.is_grad_enabled() and pred.requires_grad:
        terms: Tensor = _PerceptualTerms.apply(  # type: ignore[no-untyped-call]
            pred, spec, text, len(names), *tensors.values(), *packs
        )
        return terms
    fwd = torch.ops.gpl_fast.perceptual_fwd
    out: Tensor = fwd(pred, list(tensors.values()), list(packs), spec, text, False)[0]
    return out


def encode(
    target: Tensor,
    valid: Tensor | None,
    net: LossNet,
    layers: Sequence[str],
    *,
    activation: str,
    temperature: float,
    dtype: torch.dtype,
    workspace_mb: float | str,
) -> dict[str, Tensor]:
    """φ(target) of a dense target by layer, (N, C_b, H_b, W_b): the walk in its plain form.

    Args:
        target: (N, C, H, W) float32, bfloat16 or float16, any strides.
        Others: as `perceptual_terms`.
    """
    refuse_transforms(target)
    arithmetic = chain.arithmetic(target.device, dtype)
    megabytes, hard = workspace(target.device, workspace_mb)
    spec = plan.make_spec(
        net,
        feature_weights=dict.fromkeys(layers, 1.0),
        style_weights={},
        kind="encode",
        activation=activation,
        target_activation=activation,
        temperature=temperature,
        device=target.device.type,
        dtype=dtype,
        arithmetic=arithmetic,
        workspace_mb=megabytes,
        hard=hard,
    )
    packed = target.device, torch.float32 if arithmetic == "float32" else dtype, False
    packs = net.cached_packs(*packed)
    tensors = [] if valid is None else [valid.contiguous()]
    text = ",".join(["valid"] * len(tensors)) + ";"
    text += ",".join(chain.pack_names(net, *packed))
    fwd = torch.ops.gpl_fast.perceptual_fwd
    features = fwd(target.detach(), tensors, list(packs), spec, text, True)[1]
    return {k: e.permute(0, 3, 1, 2) for k, e in zip(dict.fromkeys(layers), features, strict=True)}


class _PerceptualTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: str, names: str, count: int, *tensors: Tensor) -> Tensor:
        target, packs = list(tensors[:count]), list(tensors[count:])
        terms, saved = torch.ops.gpl_fast.perceptual_fwd(x, target, packs, spec, names, True)
        kept = {k: t for k, t in _by_name(names, target, packs)[0].items() if k in _KEPT}
        if "ce_labels" in kept:
            kept["ce_labels"] = kept["ce_labels"].to(label_dtype(x.shape[1]))
        ctx.save_for_backward(x, *kept.values(), *packs, *saved)
        ctx.spec, ctx.counts = spec, (len(kept), len(packs))
        ctx.names = ",".join(kept) + ";" + names.split(";")[1]
        return terms  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        g = grads[0]
        if not torch.compiler.is_compiling():  # `is_grads_batched` is a vmap
            refuse_transforms(g)
        n_target, n_packs = ctx.counts
        target, packs = rest[:n_target], rest[n_target : n_target + n_packs]
        with torch.no_grad():
            dx = torch.ops.gpl_fast.perceptual_bwd(
                x, target, packs, rest[n_target + n_packs :], g, ctx.spec, ctx.names
            )
        if torch.is_grad_enabled():  # by the prediction, and by the gradient that came in
            dx = reference.refuse_double_backward(dx, x, g)
        return dx, *(None,) * (len(ctx.needs_input_grad) - 1)


def refuse_transforms(x: Tensor) -> None:
    """Derivatives that the operators do not give would be 0 in silence.

    Raises:
        NotImplementedError: a transform of `torch.func` is active, or `x` has a tangent.
    """
    if not torch.compiler.is_compiling():
        what = reference.active_transform(x)
    elif forward_ad._current_level >= 0:  # read here, where torch.compile guards on it
        what = "forward-mode derivatives"
    else:
        what = _transform_while_tracing()
    if what is None:
        return
    raise NotImplementedError(
        f"gpl_fast: the fast path has no {what}; use backend='reference', which leaves them to "
        "PyTorch (or loss.backward() and torch.autograd.grad on the fast path)"
    )


@constant_in_graphs  # torch.compile guards on the stack of transforms
def _transform_while_tracing() -> str | None:
    return reference.active_transform(torch.empty(0, device="cpu"))


def label_dtype(channels: int) -> torch.dtype:
    """Of the labels that are kept: 2 bytes a pixel instead of 8."""
    return torch.int16 if channels <= 2**15 else torch.int32


@constant_in_graphs
def workspace(device: torch.device, workspace_mb: float | str) -> tuple[float, bool]:
    """Megabytes, and whether they are a hard bound: of "auto" a share of a GPU's memory, the same
    on every rank."""
    if not isinstance(workspace_mb, str):
        return workspace_mb, True
    if device.type != "cuda":
        return plan.CPU_WORKSPACE_MB, False
    total = torch.cuda.get_device_properties(device).total_memory / plan.MIB
    return max(plan.CPU_WORKSPACE_MB, total / plan.GPU_WORKSPACE_SHARE), False


# ------------------------------------------------------------------------------------ operators


def _perceptual_fwd(
    x: Tensor, target: list[Tensor], packs: list[Tensor], spec: str, names: str, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    step = plan.Plan(plan.load_spec(spec), *_nhw(x))
    with torch.no_grad(), _no_autocast(x):
        terms, saved = chain.Forward(step, x, *_by_name(names, target, packs), keep).run()
    return terms.float(), list(saved.values()) if keep else []


def _perceptual_fwd_fake(
    x: Tensor, target: list[Tensor], packs: list[Tensor], spec: str, names: str, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    step = plan.Plan(plan.load_spec(spec), *_nhw(x))
    shapes = step.saved().values() if keep else ()
    saved = [x.new_empty(shape, dtype=dtype) for shape, dtype in shapes]
    return x.new_empty((4, x.shape[0]), dtype=torch.float32), saved


def _perceptual_bwd(
    x: Tensor,
    target: list[Tensor],
    packs: list[Tensor],
    saved: list[Tensor],
    g: Tensor,
    spec: str,
    names: str,
) -> Tensor:
    step = plan.Plan(plan.load_spec(spec), *_nhw(x))
    kept = dict(zip(step.saved(), saved, strict=True))
    with torch.no_grad(), _no_autocast(x):
        return chain.Backward(step, x, *_by_name(names, target, packs), kept, g).run()


def _perceptual_bwd_fake(
    x: Tensor,
    target: list[Tensor],
    packs: list[Tensor],
    saved: list[Tensor],
    g: Tensor,
    spec: str,
    names: str,
) -> Tensor:
    return chain.empty_gradient(x)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("perceptual_fwd", _perceptual_fwd, _key)
    _LIBRARY.impl("perceptual_bwd", _perceptual_bwd, _key)
torch.library.register_fake("gpl_fast::perceptual_fwd", _perceptual_fwd_fake, lib=_LIBRARY)
torch.library.register_fake("gpl_fast::perceptual_bwd", _perceptual_bwd_fake, lib=_LIBRARY)


def _by_name(
    names: str, target: list[Tensor], packs: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """`names` = target's and packs', as ``"a,b+c;d,e"``; ``b+c`` is one tensor of two names."""
    target_names, pack_names = (part.split(",") if part else [] for part in names.split(";"))
    by_name: dict[str, Tensor] = {}
    for entry, t in zip(target_names, target, strict=True):
        by_name |= dict.fromkeys(entry.split("+"), t)
    return by_name, dict(zip(pack_names, packs, strict=True))


def _nhw(x: Tensor) -> tuple[int, int, int]:
    return int(x.shape[0]), int(x.shape[2]), int(x.shape[3])


def _no_autocast(x: Tensor) -> Any:
    return torch.autocast(x.device.type, enabled=False)
