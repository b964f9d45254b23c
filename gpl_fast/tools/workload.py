"""What is measured: losses, and logits with targets of a shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gpl_fast
from gpl_fast.net.lossnet import LossNet

Shape = tuple[int, int, int, int]

TARGETS = ("labels", "dense", "topk")
BASELINE = "reference"  # plain PyTorch with autograd, float32
DTYPES = {BASELINE: torch.float32, "fast": torch.float32, "fast-bf16": torch.bfloat16}
TOP = 8  # classes listed in a pixel of a top-k target
BLOB = 16  # pixels: labels come in squares of this size


@dataclass(frozen=True)
class Workload:
    """Logits (N, C, H, W), the kind of target ("dense" or "labels" or "topk"), the activation."""

    shape: tuple[int, int, int, int]
    kind: str
    activation: str = "softmax"


WORKLOADS = {
    "cityscapes": Workload((8, 19, 769, 769), "dense"),
    "voc": Workload((16, 21, 512, 512), "dense"),
    "ade20k": Workload((16, 150, 512, 512), "dense"),
    "ade20k, labels": Workload((16, 150, 512, 512), "labels"),
    "ade-full": Workload((8, 847, 512, 512), "dense"),
    "ade-full, labels": Workload((8, 847, 512, 512), "labels"),
    "lvis": Workload((4, 1203, 512, 512), "dense"),
    "lvis, labels": Workload((4, 1203, 512, 512), "labels"),
    "depth": Workload((8, 1, 385, 385), "dense", "none"),
    "masks": Workload((64, 1, 200, 200), "dense", "sigmoid"),
}


def check_shape(net: LossNet, shape: Shape, kind: str) -> None:
    """That a step of logits (N, C, H, W) with a target of `kind` can be run.

    Raises:
        ValueError: a shape that the network cannot take, or a top-k target of one class.
    """
    n, c, h, w = shape
    net.shapes(h, w)
    if n < 1 or (kind == "topk" and c == 1):
        raise ValueError(f"got {n} x {c} x {h} x {w}, {kind}: expected N >= 1, top-k of C >= 2")


def make_loss(
    name: str, classes: int, workspace_mb: float | str = "auto"
) -> gpl_fast.GenericPerceptualLoss:
    """The loss that a provider is."""
    return gpl_fast.GenericPerceptualLoss(
        classes,
        activation="sigmoid" if classes == 1 else "softmax",
        backend="reference" if name == BASELINE else "fast",
        compute_dtype=DTYPES[name],
        workspace_mb=workspace_mb,
    )


def make_inputs(shape: Shape, kind: str, device: str) -> tuple[Tensor, Any]:
    """Logits (N, C, H, W) float32 and a target of `kind`, from an own generator."""
    n, c, h, w = shape
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.randn(shape, generator=generator, device=device)
    if kind == "dense":
        return logits, torch.randn(shape, generator=generator, device=device)
    coarse = torch.randint(
        c + (c == 1), (n, -(-h // BLOB), -(-w // BLOB)), generator=generator, device=device
    )
    labels = coarse.repeat_interleave(BLOB, 1)[:, :h].repeat_interleave(BLOB, 2)[..., :w]
    if kind == "labels":
        return logits, labels.contiguous()
    k = min(TOP, c)
    values = torch.rand((n, k, h, w), generator=generator, device=device)
    others = torch.arange(k, device=device).view(1, k, 1, 1)
    return logits, gpl_fast.TopK(values, (labels.unsqueeze(1) + others) % c)
