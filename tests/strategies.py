"""Hypothesis strategies: a net, options, and inputs that fit them, down to the smallest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from cases import NARROW
from hypothesis import strategies as st
from torch import Tensor

from gpl_fast import GenericPerceptualLoss, TopK

BLOCKS = ("1", "2", "1,1", "1,2", "2,1,1")


@dataclass
class Case:
    """One drawn example; `loss` makes the module, the rest are its inputs."""

    shape: tuple[int, int, int, int]
    net: dict[str, Any]
    options: dict[str, Any]
    channels_last: bool
    seed: int
    generator: torch.Generator = field(default_factory=torch.Generator, repr=False)

    def __post_init__(self) -> None:
        self.generator.manual_seed(self.seed)

    def loss(self, **overrides: Any) -> GenericPerceptualLoss:
        options = {**self.net, **self.options, **overrides}
        return GenericPerceptualLoss(self.shape[1], widths=NARROW, **options)

    def maps(self, scale: float = 2.0) -> Tensor:
        """Logits-like values in the drawn memory format."""
        x = scale * torch.randn(*self.shape, generator=self.generator)
        return x.contiguous(memory_format=torch.channels_last) if self.channels_last else x

    def labels(self) -> Tensor:
        n, c, h, w = self.shape
        return torch.randint(0, max(c, 2), (n, h, w), generator=self.generator)

    def mask(self, share: float = 0.7) -> Tensor:
        n, _, h, w = self.shape
        return torch.rand(n, h, w, generator=self.generator) < share

    def topk(self, rest: str, k: int) -> TopK:
        n, c, h, w = self.shape
        values = torch.rand(n, k, h, w, generator=self.generator)
        values = 0.9 * values / values.sum(dim=1, keepdim=True)
        indices = torch.randint(0, c, (n, k, h, w), generator=self.generator)  # with duplicates
        return TopK(values, indices, rest)

    def target(self, kind: str) -> Tensor | TopK:
        if kind == "topk":
            return self.topk("uniform", min(2, self.shape[1]))
        return self.labels() if kind == "labels" else self.maps()


@st.composite
def case(draw: st.DrawFn, min_images: int = 0) -> Case:
    blocks = draw(st.sampled_from(BLOCKS))
    depth = blocks.count(",") + 1
    sizes = st.integers(2**depth, 2**depth + 9)
    n, c = draw(st.integers(min_images, 3)), draw(st.integers(1, 6))
    weights = st.lists(st.sampled_from([0.0, 0.25, 1.0]), min_size=depth, max_size=depth)
    activations = ["sigmoid", "none"] if c == 1 else ["softmax", "sigmoid", "none"]
    return Case(
        shape=(n, c, draw(sizes), draw(sizes)),
        net={
            "net": blocks,
            "kernel_size": draw(st.sampled_from([1, 3, 5, 7])),
            "pool": draw(st.sampled_from(["max", "avg", "stride"])),
        },
        options={
            "activation": draw(st.sampled_from(activations)),
            "temperature": draw(st.sampled_from([1.0, 2.0])),
            "level_weights": draw(st.none() | weights.filter(any)),
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        },
        channels_last=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
