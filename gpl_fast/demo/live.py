"""What the terminal shows at the end."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gpl_fast.demo.experiment import ARMS, Result, summary
from gpl_fast.demo.train import Trace

MEAN = "mean"  # in the column of seeds


def table_rows(result: Result) -> list[list[str]]:
    """The final table, header first: a row a training, then each arm's mean and spread."""
    rows = [["training", "seed", "mIoU", "pixels right", "ms/step", "in loss", "saved"]]

    def add(t: Trace, name: str, seed: int) -> None:
        share = f"{t.loss_seconds / t.step_seconds:.0%}"
        figures = [f"{t.miou:.3f}", f"{t.accuracy:.3f}", f"{1e3 * t.step_seconds:.1f}"]
        rows.append([name, str(seed), *figures, share, ""])

    add(result.teacher, "teacher", result.settings.teacher_seed)
    for arm in ARMS:
        for seed, trace in zip(result.settings.seeds, result.students[arm], strict=True):
            add(trace, arm, seed)
        x = summary(result, arm)
        miou = f"{x['miou_mean']:.3f} ±{x['miou_spread']:.3f}"
        accuracy = f"{x['accuracy_mean']:.3f} ±{x['accuracy_spread']:.3f}"
        step, share = f"{1e3 * x['step_seconds']:.1f}", f"{x['loss_share']:.0%}"
        saved = f"{x['saved_bytes'] / 2**20:.2f} MiB"
        rows.append([arm, MEAN, miou, accuracy, step, share, saved])
    return rows


def print_result(console: Console, result: Result) -> None:
    """The table and the verdict."""
    header, *rows = table_rows(result)
    table = Table(
        title="Unseen digits, unseen halves of the photographs",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[1] == MEAN else None)
    console.print(table)
    console.print(f"backend: {result.backend} ({result.backend_reason})", highlight=False)
    console.print(result.verdict(), highlight=False)
