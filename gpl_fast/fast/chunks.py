"""How many images go through together, and in how many rows: what the workspace allows."""

from __future__ import annotations

from collections.abc import Iterator

from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.memory import Rows, peak, segment_peak, strip_peak
from gpl_fast.fast.policy import MIB

# A workspace that grows becomes so many times what two rows a strip need.
ENOUGH = 1.25


def chunks(plan: Segments) -> tuple[int, Rows] | None:
    """Images a chunk, and rows a strip for each segment; None where not one strip fits."""
    heights = tuple(plan.sizes[segment[0]].h for segment in plan.segments)
    preferred = _preferred_bytes(plan)
    whole = peak(plan, 1, heights)
    if whole <= min(preferred, plan.budget):
        images = max(1, min(plan.n, preferred // max(whole, 1)))
        while images > 1 and peak(plan, images, heights) > plan.budget:
            images -= 1
        return images, heights
    tried = _strips(plan, heights)
    return next(((1, rows) for rows in tried if peak(plan, 1, rows) <= plan.budget), None)


def least(plan: Segments) -> int:
    """Bytes of the strips that need least, which need not be the lowest: halos cost too."""
    heights = tuple(plan.sizes[segment[0]].h for segment in plan.segments)
    return min(peak(plan, 1, rows) for rows in _strips(plan, heights))


def _strips(plan: Segments, heights: Rows) -> Iterator[Rows]:
    """Rows of strips to try: the preferred ones, ever lower ones, and at last no strips."""
    yield from _cut(plan, tuple(_preferred_rows(plan, i, heights) for i in range(len(heights))))
    yield heights


def _least_rows(plan: Segments) -> Rows:
    heights = ((plan.steps[s[0]].stride, plan.sizes[s[0]].h) for s in plan.segments)
    return tuple(h if stride == 2 else min(2, h) for stride, h in heights)


def _preferred_bytes(plan: Segments) -> int:
    return plan.budget if plan.policy.strip_mb is None else int(plan.policy.strip_mb * MIB)


def _preferred_rows(plan: Segments, i: int, heights: Rows) -> int:
    height = heights[i]
    if plan.steps[plan.segments[i][0]].stride == 2:
        return height  # all rows at once
    if plan.policy.strip_mb is None:
        return -(-height // 2) * 2

    def of(rows: int) -> int:
        return strip_peak(plan, i, (*heights[:i], rows, *heights[i + 1 :]))

    a_row = of(height) // height if height <= 66 else (of(66) - of(2)) // 64
    rows = max(_preferred_bytes(plan) // max(a_row, 1), plan.policy.strip_rows)
    return height if rows >= height else rows // 2 * 2


def _cut(plan: Segments, rows: Rows) -> Iterator[Rows]:
    """Ever lower strips: only the segment that needs most is cut; more launches, smaller ones."""
    smallest = _least_rows(plan)
    yield rows
    while rows != smallest:
        widest = max(
            range(len(rows)), key=lambda i: (rows[i] > smallest[i], segment_peak(plan, i, 1, rows))
        )
        cut = max(smallest[widest], rows[widest] // 2 // 2 * 2)
        rows = (*rows[:widest], cut, *rows[widest + 1 :])
        yield rows
