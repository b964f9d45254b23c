"""How many images go through each segment together, and in how many rows: what the workspace
allows. On a CPU few, the same through all segments, as its cache wants it; on a GPU as many as fit,
deep segments first: their maps are small, and each launch has to fill the device."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterator

from gpl_fast.fast.geometry import Segments
from gpl_fast.fast.memory import Images, Rows, peak, segment_peak, strip_peak
from gpl_fast.fast.policy import MIB

# A workspace that grows becomes so many times what two rows a strip need.
ENOUGH = 1.25
# Of a chunk: its launches have them as their grids' y or z, which CUDA bounds.
MOST_IMAGES = 65535


def chunks(plan: Segments) -> tuple[Images, Rows] | None:
    """Images a chunk, never fewer in a deeper segment, and rows a strip, for each segment; None
    where not one strip fits."""
    heights, one = _heights(plan), _each(plan, 1)
    preferred = _preferred_bytes(plan)
    whole = peak(plan, one, heights)
    found: Rows | None = heights
    if whole > min(preferred, plan.budget):
        tried = _strips(plan, heights)
        found = next((rows for rows in tried if peak(plan, one, rows) <= plan.budget), None)
    if found is None:
        return None
    if plan.policy.strip_mb is None:
        return _as_many_as_fit(plan, found), found
    images = 1
    if found is heights and whole <= preferred:
        images = max(1, min(plan.n, preferred // max(whole, 1)))
    while images > 1 and peak(plan, _each(plan, images), heights) > plan.budget:
        images -= 1
    return _each(plan, images), found


def least(plan: Segments) -> int:
    """Bytes of the strips that need least, which need not be the lowest: halos cost too."""
    return min(peak(plan, _each(plan, 1), rows) for rows in _strips(plan, _heights(plan)))


def _heights(plan: Segments) -> Rows:
    return tuple(plan.sizes[segment[0]].h for segment in plan.segments)


def _each(plan: Segments, images: int) -> Images:
    return (images,) * len(plan.segments)


def _as_many_as_fit(plan: Segments, rows: Rows) -> Images:
    """Images of each segment's chunks, of equal size, from the deepest segment on; of one in strips
    one: their rows of a single image alone are contiguous."""
    images, most, heights = _each(plan, 1), max(1, plan.n), _heights(plan)
    for i in reversed(range(len(images))):
        if rows[i] < heights[i]:
            break

        def of(count: int, images: Images = images, i: int = i) -> Images:
            return (*images[:i], count, *images[i + 1 :])

        tried = range(1, min(most, MOST_IMAGES) + 1)
        fit = bisect(tried, False, key=lambda c: peak(plan, of(c), rows) > plan.budget)
        parts = -(-most // max(fit, 1))
        most = -(-most // parts)
        images = of(most)
    return images


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
            range(len(rows)),
            key=lambda i: (rows[i] > smallest[i], segment_peak(plan, i, _each(plan, 1), rows)),
        )
        cut = max(smallest[widest], rows[widest] // 2 // 2 * 2)
        rows = (*rows[:widest], cut, *rows[widest + 1 :])
        yield rows
