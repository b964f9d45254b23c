"""How many instructions a program of a kernel issues, read from its machine code."""

from __future__ import annotations

import re
from collections.abc import Sequence


def per_element(sass: str, trips: Sequence[int], threads: int, elements: int) -> float:
    """Thread-instructions of a program for each of its `elements`: `issued`, of `threads`."""
    return issued(sass, trips) * threads / elements


def issued(sass: str, trips: Sequence[int]) -> int:
    """Instructions that a warp issues from the entry to the end of one function.

    `sass` is that function as cuobjdump prints it; `trips` says how often the body of each loop
    runs, in the order of `loops`, of an inner one each time that the loop around it does. What is
    in no loop counts once; all of the code counts, both sides of a branch forward, what a guard
    turns off and what it calls, but not the padding behind the end: the figure is an upper bound,
    and exact where every branch goes on.
    """
    code, found = parse(sass), loops(sass)
    if len(trips) != len(found):
        raise ValueError(f"{len(found)} loops, {found}, but {len(trips)} trip counts")
    total = 0
    for at in code:
        times = 1
        for (first, last), trip in zip(found, trips, strict=True):
            times *= trip if first <= at <= last else 1
        total += times
    return total


def loops(sass: str) -> list[tuple[int, int]]:
    """(first, last) address of each loop's body, by the first, outer loops before inner ones: what
    is between a branch and where it goes back to."""
    last: dict[int, int] = {}
    for at, text in parse(sass).items():
        target = re.search(r"\bBRA\b.*?\b0x([0-9a-f]+)$", text)
        if target and (first := int(target[1], 16)) <= at:
            last[first] = max(at, last.get(first, 0))
    return sorted(last.items(), key=lambda loop: (loop[0], -loop[1]))


def parse(sass: str) -> dict[int, str]:
    """Address -> instruction, without the jump of the end to itself and the padding."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", sass, re.M)
    code = {int(address, 16): text for address, text in lines}
    end = [at for at, text in code.items() if re.search(rf"\bBRA\b.*\b0x{at:x}$", text)]
    return {at: text for at, text in code.items() if at not in end and not text.startswith("NOP")}
