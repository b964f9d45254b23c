"""The one setup that speed, memory and correctness share: inputs, and what is compared on them.

A provider is made by ``PROVIDERS[name](classes, target_kind, device)`` and called with logits
(N, C, H, W) float32 and a target, all on that device; it gives the value. All have the same frozen
network, the structure "1,1,1,1,1" with `gpl_fast.LossNet.vgg`'s weights: all give the same value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast

TARGETS = ("labels", "dense", "topk")
TOP = 8  # classes listed in a pixel of a top-k target
BLOB = 16  # pixels between the noise's grid points: labels come in regions of about this size

# ----------------------------------------------------------------------------------------- inputs


def make_inputs(
    shape: Sequence[int], kind: str, peaked: bool = False, device: str = "cpu"
) -> tuple[Tensor, Any]:
    """Logits (N, C, H, W) float32 and a target of `kind`, from own generators.

    Labels are natural blobs: the largest class of smoothed low-resolution noise. ``peaked`` raises
    the right class of prediction and teacher until it has more than 0.99 of the probability, as
    near the end of training.

    Args:
        kind: "labels" (N, H, W) int64; "dense" teacher logits (N, C, H, W) float32; "topk"
            `gpl_fast.TopK` of `TOP` classes.
    """
    n, c, h, w = shape
    if kind == "topk" and c == 1:
        raise ValueError("topk: got 1 class, expected 2 or more")
    generator = torch.Generator(device).manual_seed(0)
    labels, scores, indices = _blobs(n, c, h, w, min(TOP, c), device)
    logits = torch.randn(n, c, h, w, generator=generator, device=device)
    if peaked:
        _raise_right_class(logits, labels)
    if kind == "labels":
        return logits, labels
    if kind == "topk":
        return logits, gpl_fast.TopK(torch.softmax((8 if peaked else 2) * scores, dim=1), indices)
    teacher = torch.randn(n, c, h, w, generator=generator, device=device)
    if peaked:
        _raise_right_class(teacher, labels)
    return logits, teacher


def _blobs(n: int, c: int, h: int, w: int, k: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N, H, W), and scores, indices (N, k, H, W) of each pixel's k largest classes."""
    generator = torch.Generator(device).manual_seed(1)
    grid = (n, c, -(-h // BLOB) + 1, -(-w // BLOB) + 1)
    coarse = torch.randn(grid, generator=generator, device=device)
    if c == 1:
        fine = F.interpolate(coarse, (h, w), mode="bilinear")
        return (fine[:, 0] > 0).long(), fine, torch.zeros_like(fine, dtype=torch.long)
    tops = [
        F.interpolate(image[None], (h, w), mode="bilinear").topk(k, dim=1) for image in coarse
    ]  # one image at a time: the fine scores are as large as the logits
    scores, indices = (torch.cat(parts) for parts in zip(*tops, strict=True))
    return indices[:, 0].contiguous(), scores, indices


def _raise_right_class(logits: Tensor, labels: Tensor) -> None:
    c = logits.shape[1]
    margin = math.log(c) + 6.5
    if c == 1:
        logits += margin * (2 * labels.unsqueeze(1) - 1)
    else:
        index = labels.unsqueeze(1)
        logits.scatter_add_(1, index, torch.full_like(index, margin, dtype=logits.dtype))


def crop(logits: Tensor, target: Any, size: int) -> tuple[Tensor, Any]:
    """The first image's upper left `size` x `size` pixels."""

    def cut(t: Tensor) -> Tensor:
        return t[:1, ..., :size, :size].contiguous()

    if isinstance(target, gpl_fast.TopK):
        return cut(logits), gpl_fast.TopK(cut(target.values), cut(target.indices))
    return cut(logits), cut(target)


def target_tensors(target: Any) -> tuple[Tensor, ...]:
    """The tensors that a target consists of."""
    return (target.values, target.indices) if isinstance(target, gpl_fast.TopK) else (target,)


# -------------------------------------------------------------------------------------- providers


@dataclass(frozen=True)
class Provider:
    """``value(logits, *target_tensors)``, and the weights that it holds on to."""

    value: Callable[..., Tensor]
    weights: Callable[[], list[Tensor]]

    def __call__(self, logits: Tensor, target: Any) -> Tensor:
        return self.value(logits, *target_tensors(target))


def eager_fp32(classes: int, kind: str, device: str = "cpu") -> Provider:
    """Plain PyTorch in NCHW, as one writes it: the baseline."""
    net = _network(classes).to(device)

    def value(logits: Tensor, *target: Tensor) -> Tensor:
        features = net(_activate(logits))
        return F.mse_loss(features, net(_target_map(kind, classes, *target).float()))

    return Provider(value, lambda: list(net.parameters()))


def eager_bf16_channels_last(classes: int, kind: str, device: str = "cpu") -> Provider:
    """The usual advice: bfloat16, channels_last, the target under no_grad; softmax in float32."""
    net = _network(classes).to(device, torch.bfloat16, memory_format=torch.channels_last)

    def features(y: Tensor) -> Tensor:
        return net(y.to(torch.bfloat16, memory_format=torch.channels_last)).float()

    def value(logits: Tensor, *target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features(_target_map(kind, classes, *target))
        return F.mse_loss(features(_activate(logits)), wanted)

    return Provider(value, lambda: list(net.parameters()))


def compiled(
    make: Callable[[int, str, str], Provider], classes: int, kind: str, device: str = "cpu"
) -> Provider:
    """`make`'s through torch.compile, one graph for each shape."""
    plain = make(classes, kind, device)
    return Provider(torch.compile(plain.value, dynamic=False), plain.weights)


def fast(
    dtype: torch.dtype, classes: int, kind: str, device: str = "cpu", workspace_mb: float = 256
) -> Provider:
    """gpl_fast's fast path with `dtype` inside the network; it goes where its inputs are."""
    loss = gpl_fast.GenericPerceptualLoss(
        classes,
        activation="sigmoid" if classes == 1 else "softmax",
        backend="fast",
        compute_dtype=dtype,
        workspace_mb=workspace_mb,
    )

    def value(logits: Tensor, *target: Tensor) -> Tensor:
        return loss(logits, gpl_fast.TopK(*target) if kind == "topk" else target[0])

    return Provider(value, loss.net.cached_tensors)


PROVIDERS: dict[str, Callable[..., Provider]] = {
    "eager-fp32": eager_fp32,
    "eager-bf16-cl": eager_bf16_channels_last,
    "compile": partial(compiled, eager_fp32),
    "compile-bf16": partial(compiled, eager_bf16_channels_last),
    "gpl_fast-fp32": partial(fast, torch.float32),
    "gpl_fast-bf16": partial(fast, torch.bfloat16),
}
BASELINE = "eager-fp32"


def dtype_of(name: str) -> str:
    """What a provider's network computes in."""
    return "bfloat16" if "bf16" in name else "float32"


def _network(classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for weight in gpl_fast.LossNet.vgg(classes).weights.values():
        out, channels, size, _ = weight.shape
        conv = nn.Conv2d(channels, out, size, padding=size // 2, bias=False)
        conv.weight.data = weight
        layers += [conv, nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers).requires_grad_(False)


def _activate(logits: Tensor) -> Tensor:
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)


def _target_map(kind: str, classes: int, *target: Tensor) -> Tensor:
    """(N, C, H, W): int64 for labels, else float32."""
    if kind == "dense":
        return _activate(target[0])
    if kind == "labels":
        if classes == 1:
            return target[0].unsqueeze(1)
        return F.one_hot(target[0], classes).permute(0, 3, 1, 2)
    values, indices = target
    n, _, h, w = values.shape
    share = values / values.sum(dim=1, keepdim=True)
    return values.new_zeros(n, classes, h, w).scatter_(1, indices, share)
