"""Few cases in which every two values of two factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(case: Case) -> set[Pair]:
    return set(itertools.combinations(case.items(), 2))


def all_pairs(factors: Mapping[str, Sequence[Any]], excluded: Callable[[Case], bool]) -> set[Pair]:
    """Every pair of values that is not excluded, factors in their order."""
    found: set[Pair] = set()
    for (a, of_a), (b, of_b) in itertools.combinations(factors.items(), 2):
        found |= {((a, v), (b, w)) for v in of_a for w in of_b if not excluded({a: v, b: w})}
    return found


def covering(
    factors: Mapping[str, Sequence[Any]],
    excluded: Callable[[Case], bool],
    cost: Callable[[Case], float],
) -> list[Case]:
    """Cases that meet every pair: each starts from one that is missing and then takes, factor by
    factor, what adds most pairs for its cost.

    Args:
        excluded: of a case with some factors only; whether two of its values exclude each other.
        cost: of such a case, in pairs.
    """
    missing, cases = all_pairs(factors, excluded), []
    while missing:
        case: Case = dict(min(missing, key=repr))
        for name, values in factors.items():
            if name in case:
                continue
            tried = [ordered({**case, name: v}, factors) for v in values]
            case = max(
                (t for t in tried if not excluded(t)),
                key=lambda t: len(pairs_of(t) & missing) - cost(t),
            )
        cases.append(ordered(case, factors))
        missing -= pairs_of(cases[-1])
    return cases


def ordered(case: Case, factors: Mapping[str, Sequence[Any]]) -> Case:
    return {name: case[name] for name in factors if name in case}
