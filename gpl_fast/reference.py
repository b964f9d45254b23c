"""The Generic Perceptual Loss by definition, in plain PyTorch: the oracle of every fast path.

Source: Liu et al., "Generic Perceptual Loss for Modeling Structured Output Dependencies", CVPR
2021; Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", ECCV
2016. The sections follow docs/math.md: (1) maps, (2) the frozen network, (3) distances, (4)
precision of the chain, (5) the segmentation total. This file imports torch only.

Shapes: ``N`` images, ``C`` channels, ``H x W`` pixels; ``valid`` is ``(N, H, W)``: bool, True where
a pixel counts, or floating, the weight m of a pixel, which counts where it is above 0. Arithmetic
outside the network is float32, or float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

# ------------------------------------------------------------------ 1. From raw inputs to the maps


def activate(x: Tensor, activation: str, temperature: float = 1.0) -> Tensor:
    """``act(x / T)`` of a map ``(N, C, H, W)``, softmax over its channels."""
    if temperature != 1.0:
        if activation == "softmax":  # x / T may overflow where (x - max) / T does not
            x = x - x.amax(dim=1, keepdim=True).detach()
        limits = torch.finfo(x.dtype)
        x = x / min(max(temperature, limits.tiny), limits.max)
    if activation == "softmax":
        return torch.softmax(x, dim=1)
    return torch.sigmoid(x) if activation == "sigmoid" else x


def resize(x: Tensor, size: Sequence[int], valid: Tensor | None = None) -> Tensor:
    """Bilinear resize of ``(N, C, h, w)`` to ``size = (H, W)``, ``align_corners=False``.

    With ``valid`` ``(N, h, w)``, of what is valid alone: ``sum b m x / sum b m``, b the bilinear
    weights, m those of the pixels (1 where a bool is True); 0 where there is none.
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    if valid is not None:
        weight = resize(valid.unsqueeze(1).to(x.dtype), size)
        return resize(weighted(x, valid), size) / torch.where(weight > 0, weight, 1)
    if x.shape[0] == 0:
        return x.new_zeros(0, x.shape[1], *size)
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_mask(valid: Tensor, size: Sequence[int]) -> Tensor:
    """``(N, h, w)`` -> ``(N, H, W)``: valid, with its weight, where the nearest source is."""
    if valid.shape[0] == 0:
        return valid.new_zeros(0, *size)
    near = F.interpolate(valid.unsqueeze(1).float(), size=tuple(size), mode="nearest-exact")
    return near.squeeze(1) > 0 if valid.dtype == torch.bool else near.squeeze(1)


def one_hot(labels: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """``(N, H, W)`` int64 labels -> ``(N, C, H, W)``; -1 gives a zero pixel.

    With one channel the labels are the map itself (masks with values 0 and 1).
    """
    if channels == 1:
        return labels.clamp(min=0).unsqueeze(1).to(dtype)
    classes = torch.arange(channels, device=labels.device).view(1, -1, 1, 1)
    return (labels.unsqueeze(1) == classes).to(dtype)


def multi_hot(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """``(N, C, H, W)`` uint8 labels of single elements -> their map: 1 where they are 1."""
    return (labels == 1).to(dtype)


def dense_topk(
    values: Tensor, indices: Tensor, rest: str, channels: int, dtype: torch.dtype
) -> Tensor:
    """Sparse maps ``values, indices (N, k, H, W)`` -> ``(N, C, H, W)``; duplicates add up.

    ``rest`` says where the mass that is not listed goes: ``"renormalize"`` divides by the listed
    sum (a sum of 0 gives a zero pixel), ``"uniform"`` spreads it over the classes that are not
    listed, ``"drop"`` leaves it out.
    """
    n, _, h, w = values.shape
    values = values.to(dtype)
    if rest == "renormalize":
        values = renormalized(values)
    y = values.new_zeros(n, channels, h, w).scatter_add_(1, indices, values)
    total = values.sum(dim=1, keepdim=True)
    if rest == "uniform":
        listed = torch.zeros_like(y, dtype=torch.bool).scatter_(1, indices, True)
        unlisted = channels - listed.sum(dim=1, keepdim=True)
        share = (1 - total).clamp(min=0) / unlisted.clamp(min=1)
        return torch.where(listed, y, share)
    return y


def renormalized(values: Tensor) -> Tensor:
    """``(N, k, H, W)`` values over their sum; a sum of 0 stays 0.

    Over the largest first: sums of very small or large values are as exact as any.
    """
    if values.shape[1] == 0:
        return values
    largest = values.amax(dim=1, keepdim=True)
    values = values / torch.where(largest > 0, largest, 1)
    return values / torch.where(largest > 0, values.sum(dim=1, keepdim=True), 1)


def counted(valid: Tensor) -> Tensor:
    """Which pixels count, as bool."""
    return valid if valid.dtype == torch.bool else valid > 0


def zero_invalid(x: Tensor, valid: Tensor | None) -> Tensor:
    """0 where a pixel is not valid: selected, not multiplied, so that NaN there is harmless."""
    return x if valid is None else torch.where(counted(valid).unsqueeze(1), x, 0)


def weighted(x: Tensor, valid: Tensor | None) -> Tensor:
    """``m x``, 0 where a pixel is not valid; bool is m = 1."""
    x = zero_invalid(x, valid)
    if valid is None or valid.dtype == torch.bool:
        return x
    return x * zero_invalid(valid.unsqueeze(1).to(x.dtype), valid)


def zero_ignored(x: Tensor, elements: Tensor | None) -> Tensor:
    """0 where an element of a map ``(N, C, H, W)`` is ignored, its label in ``elements`` being 2;
    selected, as in `zero_invalid`."""
    return x if elements is None else torch.where(elements == 2, 0, x)


def prediction_map(
    pred: Tensor, activation: str, temperature: float, valid: Tensor | None
) -> Tensor:
    """``y' = act(x / T)``, 0 at pixels that are not valid, in value and gradient; no weight yet."""
    # Zeroed before the activation too: the softmax's own backward would turn NaN * 0 into NaN.
    return zero_invalid(activate(zero_invalid(pred, valid), activation, temperature), valid)


# ------------------------------------------------------------------------- 2. The frozen network


class Layer(Protocol):
    """One step of a chain; `gpl_fast.net.layers.Layer` is the implementation."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """``"conv"``, ``"relu"``, ``"maxpool"``, ``"avgpool"`` or ``"down"`` (stride 2 + ReLU)."""


def network_input(
    y: Tensor,
    valid: Tensor | None,
    adapter: Tensor | None = None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
) -> Tensor:
    """What enters the first convolution: adapter ``(3, C, 1, 1)``, mean/std ``(3,)``, ``m y``."""
    if adapter is not None:
        y = F.conv2d(y, adapter.to(y.dtype))
    if mean is not None and std is not None:
        y = (y - mean.to(y.dtype).view(1, -1, 1, 1)) / std.to(y.dtype).view(1, -1, 1, 1)
    return weighted(y, valid)


def features(
    y: Tensor, layers: Sequence[Layer], weights: Mapping[str, Tensor], taps: Sequence[str]
) -> dict[str, Tensor]:
    """Outputs of the layers named in ``taps``, each ``(N, C_b, H_b, W_b)``, from one pass."""
    outputs: dict[str, Tensor] = {}
    for layer in layers:
        if len(outputs) == len(taps):
            break
        if layer.kind in ("conv", "down"):
            w = weights[layer.name]
            stride = 2 if layer.kind == "down" else 1
            bias = weights.get(f"{layer.name}.bias")
            y = F.conv2d(y, w, bias, stride=stride, padding=w.shape[-1] // 2)
        if layer.kind in ("relu", "down"):
            y = torch.relu(y)
        elif layer.kind == "maxpool":
            y = F.max_pool2d(y, 2)
        elif layer.kind == "avgpool":
            y = F.avg_pool2d(y, 2)
        if layer.name in taps:
            outputs[layer.name] = y
    return outputs


# ----------------------------------------------------------------------------------- 3. Distances


class Distance(Protocol):
    """How features are compared; `gpl_fast.distance.Distance` is the implementation."""

    @property
    def criterion(self) -> str:
        """``"l2"`` or ``"l1"``."""

    @property
    def normalize(self) -> bool: ...
    @property
    def eps(self) -> float: ...
    @property
    def eps_inside(self) -> bool: ...


def feature_distance(
    e_pred: Tensor,
    e_target: Tensor,
    distance: Distance | None = None,
    channels: Tensor | None = None,
) -> Tensor:
    """Eq. (1) at one level: ``||E' - E||^2 / (C_b H_b W_b)`` of each sample, ``(N,)``.

    Args:
        distance: None = squares of the features' difference.
        channels: ``(C_b,)`` weights, None = 1.
    """
    return weighted_difference(e_pred, e_target, distance, channels).mean(dim=(1, 2, 3))


def weighted_difference(
    e_pred: Tensor, e_target: Tensor, distance: Distance | None, channels: Tensor | None
) -> Tensor:
    """What `feature_distance` is the mean of, ``(N, C_b, H_b, W_b)``."""
    if distance is not None and distance.normalize:
        d = unit_difference(e_pred, e_target, distance)
    else:
        d = e_pred - e_target
    each = d.square() if distance is None or distance.criterion == "l2" else d.abs()
    return each if channels is None else each * channels.to(each).view(1, -1, 1, 1)


def unit_difference(e_pred: Tensor, e_target: Tensor, distance: Distance) -> Tensor:
    """``n(φ') - n(φ)``, features over their norm ``R`` (`norm`) plus an eps that stands outside.

    From the difference, and over the larger norm, so that nothing cancels:
    ``(δ - n(φ) (R' - R)) / (R' + eps)``, or ``(δ - n(φ') (R' - R)) / (R + eps)``. Where
    ``R' = 0``, n(φ') is 0 and so is the gradient.
    """
    delta, outside = e_pred - e_target, 0.0 if distance.eps_inside else distance.eps
    (r_pred, alive), (r, seen) = norm(e_pred, distance), norm(e_target, distance)
    n_pred, n = e_pred / (r_pred + outside), torch.where(seen, e_target / (r + outside), 0)
    change = (delta * (e_pred + e_target)).sum(dim=1, keepdim=True) / (r_pred + r * seen)
    by_pred = (delta - n * change) / (r_pred + outside)
    by_target = (delta - n_pred * change) / (r + outside)
    return torch.where(alive, torch.where(r_pred >= r * seen, by_pred, by_target), -n)


def norm(e: Tensor, distance: Distance) -> tuple[Tensor, Tensor]:
    """``R = sqrt(sum_c e_c^2)``, with eps under the root if it stands inside, and where that is
    not 0, both ``(N, 1, H, W)``; elsewhere 1, so that no gradient is infinite."""
    square = e.square().sum(dim=1, keepdim=True) + (distance.eps if distance.eps_inside else 0.0)
    return torch.where(square != 0, square, 1).sqrt(), square != 0


def gram(e: Tensor) -> Tensor:
    """``G_cc' = 1/(C H W) sum_hw e_c e_c'``: ``(N, C, H, W)`` -> ``(N, C, C)`` (Johnson, eq. 3)."""
    flat = e.flatten(2)
    return flat @ flat.transpose(1, 2) / (e.shape[1] * e.shape[2] * e.shape[3])


def style_distance(e_pred: Tensor, e_target: Tensor, distance: Distance | None = None) -> Tensor:
    """``||G' - G||_F^2`` of each sample, ``(N,)``; the target may have another size, or N = 1.

    Under ``"l1"`` the mean of ``|G' - G|``. The features are never normalised.
    """
    d = gram(e_pred) - gram(e_target)
    if distance is None or distance.criterion == "l2":
        return d.square().sum(dim=(1, 2))
    return d.abs().mean(dim=(1, 2))


def total_variation(y: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean squared difference of vertical plus that of horizontal neighbours, ``(N,)``.

    A pair counts, as one, where both pixels are valid; the normalisation does not change.
    """
    result = y.new_zeros(y.shape[0])
    for dim in (2, 3):
        d = y.diff(dim=dim)
        if valid is not None:
            valid = counted(valid)
            size = valid.shape[dim - 1] - 1
            both = valid.narrow(dim - 1, 0, size) & valid.narrow(dim - 1, 1, size)
            d = zero_invalid(d, both)
        if d.shape[dim] > 0:
            result = result + d.square().mean(dim=(1, 2, 3))
    return result


# ------------------------------------------------------------------- 4. Edges of the autograd graph

_DOUBLE_BACKWARD = (
    "gpl_fast: double backward is not supported: the loss gives first derivatives only "
    "(call backward without create_graph=True, or detach the gradient)"
)


class _RefuseBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *sources: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(_DOUBLE_BACKWARD)


def refuse_double_backward(grad: Tensor, *sources: Tensor) -> Tensor:
    """A gradient whose own backward, to any of what it was made of, ends in a RuntimeError that
    says why."""
    return _RefuseBackward.apply(grad, *sources)  # type: ignore[no-untyped-call, no-any-return]


class _InputEdge(torch.autograd.Function):
    """Identity; the gradient leaves in the input's memory format and cannot be derived again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        ctx.memory_format = torch.channels_last if nhwc else torch.contiguous_format
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        dx = grads[0].contiguous(memory_format=ctx.memory_format)
        if torch.is_grad_enabled() and dx.requires_grad:
            dx = refuse_double_backward(dx, dx)
        return dx


def input_edge(x: Tensor) -> Tensor:
    """Where the loss takes the caller's tensor: see `_InputEdge`. Transforms go without it."""
    edge = x.requires_grad and (torch.compiler.is_compiling() or active_transform(x) is None)
    return _InputEdge.apply(x) if edge else x  # type: ignore[no-untyped-call]


def active_transform(x: Tensor) -> str | None:
    """The kind of derivative that PyTorch is taking of `x` beside its autograd graph, or None."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or functorch.is_legacy_batchedtensor(x):
        return "transforms of torch.func (grad, vjp, jvp, vmap, …)"
    if forward_ad._current_level >= 0:
        _, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
        return None if tangent is None else "forward-mode derivatives"
    return None


# A float16 chain runs at unit scale (docs/math.md, section 4): the seeds reach 1e-8 otherwise
# and vanish. The loss' own gradient g_n and the largest coefficient travel around the chain in
# float32, through `token`, and are applied where it ends.


class _ChainEntry(torch.autograd.Function):
    """``y`` -> ``y`` in the chain's dtype, and a token whose gradient is ``g_n``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
        ctx.dtype, ctx.scale = y.dtype, scale
        return y.to(dtype), y.new_zeros(y.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dy, g = grads
        return dy.to(ctx.dtype) * (g * ctx.scale).view(-1, 1, 1, 1), None, None


class _ChainExit(torch.autograd.Function):
    """Features -> ``dtype``; their gradient enters the chain divided by ``scale``."""

    @staticmethod
    def forward(ctx: Any, e: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.dtype, ctx.scale = e.dtype, scale
        return e.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (grads[0] / ctx.scale).to(ctx.dtype), None, None


class _UnitSeed(torch.autograd.Function):
    """Identity on the parts ``(P, N)``; sends ``g / (g_n power)`` into the chain, ``g_n = max_p
    |g|``."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, token: Tensor, power: Tensor) -> Tensor:
        ctx.power = power
        return parts.view_as(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        g_n = grads[0].abs().amax(dim=0)
        return torch.where(g_n == 0, 0, grads[0] / g_n) / ctx.power, g_n * ctx.power, None


# Seeds of normalised features in a float16 chain stay below: the layers have room to grow.
_LARGE = 256.0


@torch.no_grad()
def _power(e_pred: Mapping[str, Tensor], distance: Distance | None) -> Tensor:
    """``(N,)`` powers of two: a seed of normalised features, which grows as ``1 / R'``, over it is
    one that float16 holds."""
    power = torch.ones((), dtype=torch.float32)
    if distance is None or not distance.normalize:
        return power
    for e in e_pred.values():
        root, alive = norm(e, distance)
        root = torch.where(alive, root, torch.inf).flatten(1) + distance.eps * (
            not distance.eps_inside
        )
        # |u| <= 2, and the seed is what is left of u across n(φ'), over R'.
        large = (4 / (_LARGE * root)).amax(dim=1).clamp(min=1)
        power = torch.maximum(power.to(large.device), torch.exp2(large.log2().ceil()))
    return power


def perceptual_terms(
    y_pred: Tensor,
    extract: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]],
    target: Mapping[str, Tensor],
    style_target: Mapping[str, Tensor],
    feature_weights: Mapping[str, float],
    style_weights: Mapping[str, float],
    dtype: torch.dtype,
    *,
    distance: Distance | None = None,
    channels: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Eq. (1) over the levels and the style distances, weighted: ``{"feature", "style"}``, (N,).

    Args:
        y_pred: (N, C0, H, W) what enters the first convolution, float32 or float64.
        extract: features of a map at named layers, in the map's dtype.
        target, style_target: the target's features by layer.
        feature_weights, style_weights: weight by layer.
        dtype: what the chain computes in.
        distance: how features are compared; None = by their mean square.
        channels: (C_b,) by layer, that the weights of features are multiplied with.
    """
    acc = y_pred.dtype if dtype != torch.float64 else dtype
    taps = tuple(dict.fromkeys((*feature_weights, *style_weights)))
    unit_scale = dtype == torch.float16 and y_pred.requires_grad
    shapes = {tap: e.shape for tap, e in (*style_target.items(), *target.items())}
    l1 = distance is not None and distance.criterion == "l1"
    scale = max(
        _largest_seed(feature_weights.get(tap, 0.0), style_weights.get(tap, 0.0), shapes[tap], l1)
        for tap in taps
    )
    e_pred, token = _chain(y_pred, extract, taps, dtype, scale if unit_scale else None)
    feature = y_pred.new_zeros(y_pred.shape[0], dtype=acc)
    for tap, weight in feature_weights.items():
        by_channel = None if channels is None else channels.get(tap)
        of_tap = feature_distance(e_pred[tap], target[tap].to(acc), distance, by_channel)
        feature = feature + weight * of_tap
    style = y_pred.new_zeros(y_pred.shape[0], dtype=acc)
    for tap, weight in style_weights.items():
        of_tap = style_distance(e_pred[tap], style_target[tap].to(acc), distance)
        style = style + weight * of_tap
    if token is not None:
        power = _power({tap: e_pred[tap] for tap in feature_weights}, distance)
        feature, style = _UnitSeed.apply(torch.stack([feature, style]), token, power)  # type: ignore[no-untyped-call]
    return {"feature": feature, "style": style}


def distance_map(
    y_pred: Tensor,
    extract: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]],
    target: Mapping[str, Tensor],
    weights: Mapping[str, float],
    dtype: torch.dtype,
    *,
    distance: Distance,
    channels: Mapping[str, Tensor],
) -> Tensor:
    """The levels' distances at each pixel, weighted, each resized bilinearly: their sum, (N, 1, H,
    W). Arguments as in `perceptual_terms`.

    Of one level the mean over its own pixels, before the resize, is its term of eq. (1).
    """
    acc = y_pred.dtype if dtype != torch.float64 else dtype
    n, _, height, width = y_pred.shape
    scale: float | None = None
    if dtype == torch.float16 and y_pred.requires_grad:
        # Of a level's pixel, to which the gradients of all that it is resized to add up.
        l1, area = distance.criterion == "l1", height * width
        scale = max(area * _largest_seed(w, 0.0, target[k].shape, l1) for k, w in weights.items())
    e_pred, token = _chain(y_pred, extract, tuple(weights), dtype, scale)
    total = y_pred.new_zeros(n, 1, height, width, dtype=acc)
    for tap, weight in weights.items():
        each = weighted_difference(e_pred[tap], target[tap].to(acc), distance, channels.get(tap))
        total = total + weight * resize(each.mean(dim=1, keepdim=True), (height, width))
    if token is not None:
        parts = total.flatten(1).t()  # (H W, N)
        parts = _UnitSeed.apply(parts, token, _power(e_pred, distance))  # type: ignore[no-untyped-call]
        total = parts.t().reshape(total.shape)
    return total


def _chain(
    y_pred: Tensor,
    extract: Callable[[Tensor, Sequence[str]], Mapping[str, Tensor]],
    taps: Sequence[str],
    dtype: torch.dtype,
    scale: float | None,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Features by a chain in `dtype`; with a `scale` at unit scale, and its token."""
    acc = y_pred.dtype if dtype != torch.float64 else dtype
    if scale is None:
        return {tap: e.to(acc) for tap, e in extract(y_pred.to(dtype), taps).items()}, None
    y, token = _ChainEntry.apply(y_pred, dtype, scale)  # type: ignore[no-untyped-call]
    found = extract(y, taps).items()
    return {tap: _ChainExit.apply(e, acc, scale) for tap, e in found}, token  # type: ignore[no-untyped-call]


def _largest_seed(feature: float, style: float, shape: Sequence[int], l1: bool) -> float:
    """The larger coefficient of the two gradients at a tap, of the weights of its distances."""
    _, c, h, w = shape
    if l1:
        return max(feature, 2.0 * style / c**2) / (c * h * w)
    return 2.0 * max(feature, 2.0 * style) / (c * h * w)


# ---------------------------------------------------------------------------- 5. Segmentation total


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's cross-entropy: the sum over each image's valid pixels and that of their weights.

    Their quotient is ``F.cross_entropy``'s mean, of a mask ``sum m w l / sum m w``; both (N,).

    Args:
        logits: (N, C, H, W) float32 or float64.
        labels: (N, H, W) int64, -1 = does not count.
        class_weight: (C,) or None.
        label_smoothing: in [0, 1].
        mask: (N, H, W) floating, the weight m of each pixel, or None = 1.
    """
    counts = labels >= 0
    # Zeroed first: an ignored NaN logit would reach the gradient through softmax's backward.
    pixel = F.cross_entropy(
        zero_invalid(logits, counts),
        labels,
        weight=class_weight,
        ignore_index=-1,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    norm = counts.to(pixel.dtype)
    if class_weight is not None:
        norm = class_weight[labels.clamp(min=0)] * norm
    if mask is not None:
        m = torch.where(counts & counted(mask), mask.to(pixel.dtype), 0)
        pixel, norm = pixel * m, norm * m
    return pixel.sum(dim=(1, 2)), norm.sum(dim=(1, 2))


def binary_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    pos_weight: Tensor | None,
    label_smoothing: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's binary cross-entropy with logits: the sum over each image's elements that count,
    and how many there are; both (N,).

    Args:
        logits: (N, C, H, W) float32 or float64.
        labels: (N, C, H, W) uint8: 0, 1, or 2 = does not count.
        class_weight: (C,) by which a class' losses are multiplied, or None.
        pos_weight: (C,) by which a class' losses of label 1 are, or None.
        label_smoothing: in [0, 1]: a label y is y (1 - e) + e / 2.
        mask: (N, H, W) floating, the weight m of each pixel's elements, or None = 1.
    """
    counts = (labels != 2).to(logits.dtype)
    y = multi_hot(labels, logits.dtype) * (1 - label_smoothing) + label_smoothing / 2
    # Zeroed first: an ignored NaN logit would reach the gradient as NaN times 0.
    x = zero_ignored(logits, labels)
    positive = y if pos_weight is None else pos_weight.view(-1, 1, 1) * y
    # Two terms >= 0: F.binary_cross_entropy_with_logits cancels where x is far below 0.
    element = -(positive * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))
    if class_weight is not None:
        element = class_weight.view(-1, 1, 1) * element
    if mask is not None:
        m = torch.where(counted(mask), mask.to(logits.dtype), 0)
        counts = counts * m.unsqueeze(1)
    return (element * counts).sum(dim=(1, 2, 3)), counts.sum(dim=(1, 2, 3))
