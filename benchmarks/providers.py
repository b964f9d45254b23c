"""The one setup that speed, memory and correctness share: inputs, and what is compared on them.

A provider is made by ``PROVIDERS[name](classes, target_kind, device, net)`` and called with logits
(N, C, H, W) float32 and a target, all on that device; it gives the value. All have the same frozen
network, the structure `net` with `gpl_fast.LossNet.vgg`'s weights: all give the same value.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpl_fast
from gpl_fast.net.structure import parse_blocks
from gpl_fast.tools.measure import target_tensors

TARGETS = ("labels", "dense", "topk")
NET = "1,1,1,1,1"
LPIPS = "lpips"  # in the place of a network's structure: LPIPS on VGG16, see `peer_losses`
TOP = 8  # classes listed in a pixel of a top-k target
BLOB = 16  # pixels between the noise's grid points: labels come in regions of about this size
PIECES = 16  # of random numbers, each from a generator of its own
PRESENT = 32  # classes at most in an image: scenes show few of many
# Nats a pixel, the mean over the demo's test scenes of its student after training.
TRAINED_ENTROPY = 0.11

# ----------------------------------------------------------------------------------------- inputs


def make_inputs(
    shape: Sequence[int], kind: str, peaked: bool = False, device: str = "cpu"
) -> tuple[Tensor, Any]:
    """Logits (N, C, H, W) float32 and a target of `kind`, from own generators.

    Labels are natural blobs: the largest class of smoothed low-resolution noise, over at most
    `PRESENT` classes of each image. ``peaked`` raises the right class of prediction and teacher
    until a pixel's distribution has `TRAINED_ENTROPY` on average.

    Args:
        kind: "labels" (N, H, W) int64; "dense" teacher logits (N, C, H, W) float32; "topk"
            `gpl_fast.TopK` of `TOP` classes; "images" in [-1, 1] in the place of both.
    """
    n, c, h, w = shape
    if kind == "images":
        return _images(shape, device)
    if kind == "topk" and c == 1:
        raise ValueError("topk: got 1 class, expected 2 or more")
    labels, scores, indices = _blobs(n, c, h, w, device)
    logits = _noise(shape, 0, device)
    if peaked:
        _raise_right_class(logits, labels)
    if kind == "labels":
        return logits, labels
    if kind == "topk":
        return logits, gpl_fast.TopK(torch.softmax((8 if peaked else 2) * scores, dim=1), indices)
    teacher = _noise(shape, PIECES, device)
    if peaked:
        _raise_right_class(teacher, labels)
    return logits, teacher


def _images(shape: Sequence[int], device: str) -> tuple[Tensor, Tensor]:
    """Blurred noise with finer noise on top, and without: a decoder's output and its target."""
    n, c, h, w = shape
    coarse = _noise((n, c, -(-h // BLOB) + 1, -(-w // BLOB) + 1), 0, device)
    target = F.interpolate(coarse, (h, w), mode="bilinear").tanh()
    return (target + 0.1 * _noise(shape, PIECES, device)).clamp(-1, 1), target


def _noise(shape: Sequence[int], seed: int, device: str) -> Tensor:
    """Unit Gaussian, drawn in pieces side by side: torch draws one in one thread."""
    noise = torch.empty(tuple(shape), device=device)

    def draw(i: int, piece: Tensor) -> None:
        piece.normal_(generator=torch.Generator(device).manual_seed(seed + i))

    pieces = noise.view(-1).chunk(PIECES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(draw, range(len(pieces)), pieces))
    return noise


def _blobs(n: int, c: int, h: int, w: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (N, H, W), and scores, indices (N, k, H, W) of each pixel's `TOP` largest classes."""
    generator = torch.Generator(device).manual_seed(1)
    present = min(c, PRESENT)
    grid = (n, present, -(-h // BLOB) + 1, -(-w // BLOB) + 1)
    coarse = torch.randn(grid, generator=generator, device=device)
    fine = F.interpolate(coarse, (h, w), mode="bilinear")
    if c == 1:
        return (fine[:, 0] > 0).long(), fine, torch.zeros_like(fine, dtype=torch.long)
    scores, ranks = fine.topk(min(TOP, c), dim=1)
    classes = torch.rand((n, c), generator=generator, device=device).argsort(dim=1)[:, :present]
    indices = classes.gather(1, ranks.flatten(1)).view_as(ranks)
    return indices[:, 0].contiguous(), scores, indices


def _raise_right_class(logits: Tensor, labels: Tensor) -> None:
    c = logits.shape[1]
    margin = margin_of(c, TRAINED_ENTROPY)
    if c == 1:
        logits += margin * (2 * labels.unsqueeze(1) - 1)
    else:
        index = labels.unsqueeze(1)
        logits.scatter_add_(1, index, torch.full_like(index, margin, dtype=logits.dtype))


@cache
def margin_of(classes: int, entropy: float) -> float:
    """What the right one of unit Gaussian logits must be raised by for that mean entropy, nats."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1024, max(classes, 2), generator=generator)
    if classes == 1:
        logits[:, 1] = 0  # a sigmoid is a softmax over (z, 0)
    low, high = 0.0, 40.0
    for _ in range(30):
        middle = (low + high) / 2
        logits[:, 0] += middle
        found = torch.distributions.Categorical(logits=logits).entropy().mean()
        logits[:, 0] -= middle
        low, high = (middle, high) if found > entropy else (low, middle)
    return middle


def crop(logits: Tensor, target: Any, size: int) -> tuple[Tensor, Any]:
    """The first image's upper left `size` x `size` pixels."""

    def cut(t: Tensor) -> Tensor:
        return t[:1, ..., :size, :size].contiguous()

    if isinstance(target, gpl_fast.TopK):
        return cut(logits), gpl_fast.TopK(cut(target.values), cut(target.indices))
    return cut(logits), cut(target)


# -------------------------------------------------------------------------------------- providers


@dataclass(frozen=True)
class Provider:
    """``value(logits, *target_tensors)``, and the weights that it holds on to."""

    value: Callable[..., Tensor]
    weights: Callable[[], list[Tensor]]

    def __call__(self, logits: Tensor, target: Any) -> Tensor:
        return self.value(logits, *target_tensors(target))


def eager_fp32(classes: int, kind: str, device: str = "cpu", net: str = NET) -> Provider:
    """Plain PyTorch in NCHW, as one writes it: the baseline."""
    network = _network(classes, net).to(device)

    def value(logits: Tensor, *target: Tensor) -> Tensor:
        features = network(_activate(logits))
        return F.mse_loss(features, network(_target_map(kind, classes, *target).float()))

    return Provider(value, lambda: list(network.parameters()))


def eager_bf16(classes: int, kind: str, device: str = "cpu", net: str = NET) -> Provider:
    """The same with the network in bfloat16; softmax and mean in float32."""
    network = _network(classes, net).to(device, torch.bfloat16)

    def value(logits: Tensor, *target: Tensor) -> Tensor:
        features = network(_activate(logits).bfloat16())
        wanted = network(_target_map(kind, classes, *target).bfloat16())
        return F.mse_loss(features.float(), wanted.float())

    return Provider(value, lambda: list(network.parameters()))


def eager_bf16_channels_last(
    classes: int, kind: str, device: str = "cpu", net: str = NET
) -> Provider:
    """The usual advice: bfloat16, channels_last, the target under no_grad; softmax in float32."""
    network = _network(classes, net).to(device, torch.bfloat16, memory_format=torch.channels_last)

    def features(y: Tensor) -> Tensor:
        return network(y.to(torch.bfloat16, memory_format=torch.channels_last)).float()

    def value(logits: Tensor, *target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = features(_target_map(kind, classes, *target))
        return F.mse_loss(features(_activate(logits)), wanted)

    return Provider(value, lambda: list(network.parameters()))


def compiled(
    make: Callable[..., Provider], classes: int, kind: str, device: str = "cpu", net: str = NET
) -> Provider:
    """`make`'s through torch.compile, one graph for each shape."""
    plain = make(classes, kind, device, net)
    return Provider(torch.compile(plain.value, dynamic=False), plain.weights)


def fast(
    dtype: torch.dtype,
    classes: int,
    kind: str,
    device: str = "cpu",
    net: str = NET,
    workspace_mb: float | str = "auto",
) -> Provider:
    """gpl_fast's fast path with `dtype` inside the network; it goes where its inputs are."""
    loss = gpl_fast.GenericPerceptualLoss(
        classes,
        loss_net(classes, net),
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
    "eager-bf16": eager_bf16,
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


@lru_cache(maxsize=2)
def loss_net(classes: int, net: str = NET) -> gpl_fast.LossNet:
    """The network of all providers; of LPIPS, one with the same convolutions."""
    return gpl_fast.LossNet.vgg(classes, parse_blocks("vgg16" if net == LPIPS else net))


def flops(shape: Sequence[int], kind: str, net: str = NET) -> int:
    """Of a step as defined: both branches and the data gradient."""
    n, c, h, w = shape
    network = loss_net(c, net)
    activation = "sigmoid" if c == 1 else "softmax"
    loss = gpl_fast.GenericPerceptualLoss(c, network, activation=activation, backend="reference")
    target = torch.empty(tuple(shape), device="meta")
    if kind == "labels":
        target = torch.empty((n, h, w), dtype=torch.long, device="meta")
    return loss.explain(torch.empty(tuple(shape), device="meta"), target).flops


def _network(classes: int, net: str) -> nn.Sequential:
    network = loss_net(classes, net)
    weights = network.weights
    layers: list[nn.Module] = []
    for layer in network.layers:
        if layer.kind == "conv":
            size = layer.kernel_size
            conv = nn.Conv2d(
                layer.in_channels, layer.out_channels, size, padding=size // 2, bias=False
            )
            conv.weight.data = weights[layer.name]
            layers.append(conv)
        else:
            layers.append(nn.ReLU(inplace=True) if layer.kind == "relu" else nn.MaxPool2d(2))
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
