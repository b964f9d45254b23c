"""What the terminal shows: progress while something runs."""

from __future__ import annotations

import math

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from gpl_fast.experiments.frame import OnStep


def progress_bars(console: Console) -> Progress:
    """Bars with a training's loss and last score; off a terminal `watch` prints lines instead."""
    return Progress(
        TextColumn("{task.description:<21}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]:<23}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        refresh_per_second=4,
    )


def watch(progress: Progress, title: str, steps: int, score: str = "mIoU") -> OnStep:
    """A bar for one training, or for steps without a loss, whose loss is NaN."""
    task = progress.add_task(title, total=steps, state="")
    smooth: list[float] = []
    done = 0

    def on_step(loss: float, value: float | None) -> None:
        nonlocal done
        done += 1
        smooth[:] = [0.95 * smooth[0] + 0.05 * loss if smooth else loss]
        shown = [] if math.isnan(loss) else [f"loss {smooth[0]:.3f}"]
        shown += [] if value is None else [f"{score} {value:.3f}"]
        progress.update(task, advance=1, state="  ".join(shown))
        if progress.disable and done == steps:
            line = ", ".join([f"{title}: {steps} steps", "  ".join(shown)][: 1 + bool(shown)])
            progress.console.print(line, highlight=False)

    return on_step
