"""What an experiment is, and what it leaves behind for the report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OnStep = Callable[[float, float | None], None]  # loss of the step, last score
Observe = Callable[[str, int], OnStep]  # (title, steps) -> what to call at each step

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; the last for any more.
_STUDENT_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Settings:
    """What a caller may choose."""

    seeds: tuple[int, ...]
    steps: int
    quick: bool = False
    device: str = "cpu"


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Outcome:
    """What was measured."""

    verdict: str  # one sentence, whichever way it went
    protocol: list[str]  # how the figures came about
    tables: list[Table]
    data: dict[str, Any]  # every figure, in JSON's types
    figure: Figure | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Experiment:
    """One question and how it is asked."""

    title: str
    question: str
    seconds: int  # a full run at the default settings on one thread takes about so long
    run: Callable[[Settings, Observe], Outcome]
    seeds: tuple[int, ...] = (0,)
    steps: int = 1  # of what `unit` says
    quick_seeds: int = 1
    quick_steps: int = 1
    unit: str = "steps"

    def settings(
        self, seeds: Sequence[int] | None, steps: int | None, quick: bool, device: str
    ) -> Settings:
        """The defaults where nothing is given; quick: few seeds and few steps."""
        default_seeds = self.seeds[: self.quick_seeds] if quick else self.seeds
        default_steps = self.quick_steps if quick else self.steps
        return Settings(tuple(seeds or default_seeds), steps or default_steps, quick, device)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 for one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def half_interval(values: Sequence[float]) -> float:
    """Half the 95 % interval of the mean, by Student's t; NaN for one value."""
    count = len(values)
    if count < 2:
        return float("nan")
    t = _STUDENT_T[min(count - 1, len(_STUDENT_T)) - 1]
    return float(t * statistics.stdev(values) / count**0.5)


def with_interval(values: Sequence[float], digits: int = 3) -> str:
    """Mean ± half interval, or the value alone."""
    mean, half = statistics.fmean(values), half_interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")
