"""Nets trained on scenes, seen at several moments: the demo's student, and two of many classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from composed_scenes import Composition, render
from torch import Tensor, nn
from torch.nn import functional as F

from gpl_fast import SegmentationLoss
from gpl_fast.demo.experiment import Settings, scenes_for
from gpl_fast.demo.models import UNet
from gpl_fast.demo.scenes import NUM_CLASSES, Scenes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Task:
    """Scenes, and how a net is trained on them."""

    name: str
    classes: int
    train: Scenes
    test: Scenes
    measured: int  # the first test scenes
    widths: tuple[int, int]  # of the student and of the teacher
    steps: tuple[int, int]  # the same
    crop: int
    batch: int
    stride: int  # of the pixels that the cross-entropy sees
    moments: tuple[float, ...] = (0, 0.15, 0.4, 1)  # of the training, when the student is looked at

    def net(self, width: int, seed: int) -> tuple[nn.Module, nn.Module]:
        """Trunk and head; many classes need more features than a narrow U-Net ends in."""
        torch.manual_seed(seed)
        if self.classes == NUM_CLASSES:
            return UNet(self.classes, width), nn.Identity()
        return UNet(64, width), nn.Sequential(nn.ReLU(), nn.Conv2d(64, self.classes, 1))


Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, images -> 0-dim


def cross_entropy(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


def stages(
    task: Task, kind: int, seed: int, at: Sequence[int], criterion: Criterion
) -> Iterator[tuple[int, nn.Module]]:
    """Trains the student (kind 0) or the teacher (1); yields (step, net in eval) at the steps."""
    trunk, head = task.net(task.widths[kind], seed)
    net = nn.Sequential(trunk, head).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    order, steps, lr = torch.Generator().manual_seed(seed), task.steps[kind], 4e-3
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(steps, 10), pct_start=0.2
    )
    for step in range(steps + 1):
        if step in at:
            yield step, net.eval()
        if step == steps:
            return
        net.train()
        index = torch.randint(len(task.train), (task.batch,), generator=order)
        images, labels = task.train.batch(index, CPU)
        room = images.shape[-1] - task.crop + 1
        i, j = torch.randint(room, (2,), generator=order).tolist()
        box = (..., slice(i, i + task.crop), slice(j, j + task.crop))
        seen = (..., slice(None, None, task.stride), slice(None, None, task.stride))
        loss = criterion(head(trunk(images[box])[seen]), labels[box][seen], images[box])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def trained(task: Task) -> Iterator[tuple[int, nn.Module, nn.Module]]:
    """(step, student, teacher) at the task's moments."""
    *_, (_, teacher) = stages(task, 1, 7, (task.steps[1],), cross_entropy)
    at = [round(task.steps[0] * moment) for moment in task.moments]
    criterion: Criterion = cross_entropy
    if task.classes == NUM_CLASSES:
        loss = SegmentationLoss(task.classes, gpl_weight=Settings.gpl_weight)

        def with_gpl(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
            with torch.no_grad():
                soft = teacher(images)
            value: Tensor = loss(logits, labels, teacher=soft)
            return value

        criterion = with_gpl
    for step, student in stages(task, 0, 0, at, criterion):
        yield step, student, teacher


def demo_task() -> Task:
    s = Settings()
    widths, steps = (s.student_width, s.teacher_width), (s.steps, s.teacher_steps)
    scenes = scenes_for(s)
    return Task("demo", NUM_CLASSES, *scenes, 12, widths, steps, s.size, s.batch, 1)


def composed_task(
    hues: int, fills: int, measured: int, steps: tuple[int, int], stride: int
) -> Task:
    made = Composition(hues, fills)
    scenes = render(made, "train", 512, 128, seed=1), render(made, "test", 24, 128, seed=2)
    name = f"{made.classes} classes"
    return Task(name, made.classes, *scenes, measured, (16, 16), steps, 32, 20, stride)


def many_classes() -> Task:
    # A look at 1200 classes costs a minute: one scene, and not before something is learned.
    task = composed_task(hues=20, fills=5, measured=1, steps=(2000, 800), stride=3)
    return replace(task, moments=(0.4, 1))


TASKS: dict[str, Callable[[], Task]] = {
    "demo": demo_task,
    "150": lambda: composed_task(hues=5, fills=2, measured=3, steps=(1000, 700), stride=2),
    "1200": many_classes,
}
