"""A training step of the demo's student, with and without the loss beside the cross-entropy."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial

import torch
from providers import Provider
from torch.nn import functional as F

from gpl_fast.demo.experiment import Settings
from gpl_fast.demo.models import UNet

WITHOUT = "cross-entropy"  # the row without the loss


def steps(
    made: Mapping[str, Provider], shape: tuple[int, int, int, int]
) -> dict[str, Callable[[], list[float]]]:
    """Seconds of a whole step (forward, losses, backward, AdamW) on random images, by provider;
    the target are a teacher's logits of `shape` (N, C, H, W)."""
    n, c, h, w = shape
    generator = torch.Generator().manual_seed(0)
    student = UNet(c, Settings.student_width).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    images = torch.randn(n, 3, h, w, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(c, (n, h, w), generator=generator)
    teacher = torch.randn(shape, generator=generator)

    def once(provider: Provider | None) -> list[float]:
        start = time.perf_counter()
        logits = student(images)
        value = F.cross_entropy(logits, labels)
        if provider is not None:
            value = value + Settings.gpl_weight * provider(logits, teacher)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return [time.perf_counter() - start]

    return {WITHOUT: partial(once, None), **{k: partial(once, p) for k, p in made.items()}}
