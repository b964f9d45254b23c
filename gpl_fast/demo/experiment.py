"""The protocol: one teacher, then for each seed two students that differ in the loss alone."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

from gpl_fast import SegmentationLoss
from gpl_fast.backend import choose
from gpl_fast.demo.scenes import NUM_CLASSES, Scenes, digit_heights, load_sources, render
from gpl_fast.demo.train import (
    Criterion,
    Schedule,
    Trace,
    all_logits,
    bytes_saved,
    cross_entropy,
    predict,
    train,
)
from gpl_fast.experiments.frame import Observe, half_interval, mean_and_spread

BASELINE, WITH_GPL = "cross-entropy", "with the loss"
ARMS = (BASELINE, WITH_GPL)


@dataclass(frozen=True)
class Settings:
    """Everything that decides the figures, besides the machine. Sizes in pixels."""

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 900  # of a student
    gpl_weight: float = 0.1
    net: str = "1,1,1,1,1"
    size: int = 32
    train_scenes: int = 4096
    test_scenes: int = 256
    batch: int = 16
    lr: float = 4e-3
    teacher_width: int = 24
    teacher_steps: int = 800
    teacher_seed: int = 7
    student_width: int = 12
    device: str = "cpu"
    backend: str = "auto"
    workspace_mb: float | str = "auto"


@dataclass
class Result:
    """What the report shows."""

    settings: Settings
    backend: str  # the one that ran
    backend_reason: str
    fingerprint: str  # of the loss's network
    teacher: Trace = field(default_factory=Trace)
    students: dict[str, list[Trace]] = field(default_factory=dict)  # arm -> one a seed
    saved_bytes: dict[str, int] = field(default_factory=dict)  # arm -> bytes of one loss call
    images: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (P, 3, S, S) uint8
    truth: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # (P, S, S)
    predictions: dict[str, torch.Tensor] = field(default_factory=dict)  # arm -> (P, S, S)
    seconds: float = 0.0

    def differences(self) -> list[float]:
        """mIoU with the loss minus without, one a seed."""
        pairs = zip(self.students[WITH_GPL], self.students[BASELINE], strict=True)
        return [with_gpl.miou - baseline.miou for with_gpl, baseline in pairs]

    def verdict(self) -> str:
        """One sentence that says what was measured, whichever way it went."""
        deltas = self.differences()
        count, mean = len(deltas), statistics.fmean(deltas)
        measured = f"mIoU {mean:+.4f} with the loss, mean over {count} pairs of the same seed"
        if count < 2:
            return f"{measured}: one seed says nothing about noise."
        half = half_interval(deltas)
        measured += f" (95 % interval ± {half:.4f})"
        if abs(mean) <= half:
            return f"{measured}: within the noise between seeds."
        return f"{measured}: it {'helps' if mean > 0 else 'hurts'} here."


def summary(result: Result, arm: str) -> dict[str, float]:
    """One arm over all seeds: mean and spread of the scores, mean of the medians of seconds."""
    traces = result.students[arm]
    miou, miou_spread = mean_and_spread([t.miou for t in traces])
    accuracy, accuracy_spread = mean_and_spread([t.accuracy for t in traces])
    step = statistics.fmean(t.step_seconds for t in traces)
    loss = statistics.fmean(t.loss_seconds for t in traces)
    return {
        "miou_mean": miou,
        "miou_spread": miou_spread,
        "accuracy_mean": accuracy,
        "accuracy_spread": accuracy_spread,
        "step_seconds": step,
        "loss_seconds": loss,
        "loss_share": loss / step,
        "saved_bytes": result.saved_bytes[arm],
    }


def scenes_for(s: Settings) -> tuple[Scenes, Scenes]:
    """The training and the test scenes; the same for all seeds of the students."""
    heights = digit_heights(s.size)
    train_scenes = render(load_sources("train", heights), s.train_scenes, s.size, seed=1)
    test_scenes = render(load_sources("test", heights), s.test_scenes, s.size, seed=2)
    return train_scenes, test_scenes


def run_experiment(s: Settings, observe: Observe) -> Result:
    """Teacher, students, measurements; minutes at the default settings."""
    start, device = time.perf_counter(), torch.device(s.device)
    loss = SegmentationLoss(
        NUM_CLASSES,
        gpl_weight=s.gpl_weight,
        net=s.net,
        backend=s.backend,
        workspace_mb=s.workspace_mb,
    )
    choice = choose(s.backend, device, torch.float32, loss.net)
    result = Result(s, choice.name, choice.reason, loss.fingerprint())
    result.saved_bytes = _measure_bytes(loss, s, device)

    train_scenes, test_scenes = scenes_for(s)
    schedule = Schedule(s.teacher_steps, s.batch, s.lr, s.teacher_seed)
    on_step = observe("teacher", s.teacher_steps)
    teacher, result.teacher = train(
        s.teacher_width, train_scenes, test_scenes, schedule, device, on_step=on_step
    )
    teacher_logits = all_logits(teacher, train_scenes, device)

    def with_gpl(logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        target = teacher_logits[index].to(logits.device, logits.dtype)
        value: torch.Tensor = loss(logits, labels, teacher=target)
        return value

    criteria: dict[str, Criterion] = {BASELINE: cross_entropy, WITH_GPL: with_gpl}
    shown = min(6, s.test_scenes)
    result.images, result.truth = test_scenes.images[:shown], test_scenes.labels[:shown]
    result.students = {arm: [] for arm in ARMS}
    for seed in s.seeds:
        schedule = Schedule(s.steps, s.batch, s.lr, seed)
        for arm in ARMS:
            student, trace = train(
                s.student_width,
                train_scenes,
                test_scenes,
                schedule,
                device,
                criteria[arm],
                observe(f"seed {seed}, {arm}", s.steps),
            )
            result.students[arm].append(trace)
            # The pictures are the last seed's.
            result.predictions[arm] = predict(student, test_scenes, shown, device)
    result.seconds = time.perf_counter() - start
    return result


def _measure_bytes(loss: SegmentationLoss, s: Settings, device: torch.device) -> dict[str, int]:
    """Bytes saved for backward by each arm's loss on one batch of random logits."""
    rng = torch.Generator().manual_seed(0)
    shape = (s.batch, NUM_CLASSES, s.size, s.size)
    logits = torch.randn(shape, generator=rng).to(device).requires_grad_()
    teacher = torch.randn(shape, generator=rng).to(device)
    labels = torch.randint(NUM_CLASSES, (s.batch, s.size, s.size), generator=rng).to(device)
    return {
        BASELINE: bytes_saved(lambda x, y: cross_entropy(x, y, y), logits, labels),
        WITH_GPL: bytes_saved(lambda x, y, t: loss(x, y, teacher=t), logits, labels, teacher),
    }
