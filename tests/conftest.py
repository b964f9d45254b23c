"""Settings of all tests."""

from __future__ import annotations

import collections
import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from cases import BACKENDS
from hypothesis import settings
from policies import decided

# No deadline: the machine is shared. Derandomised: a failure is the code's, not the day's.
settings.register_profile("gpl_fast", deadline=None, derandomize=True)
settings.load_profile("gpl_fast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The cross-section of `make check`: of each file the first test and every sixth after it, the
    last of its cases, which is the fast path's. tests/stages chooses its own; what is slow is left
    out."""
    last_cases: dict[Path, dict[object, pytest.Item]] = collections.defaultdict(dict)
    for item in items:
        if item.path.parent.name != "stages":
            last_cases[item.path][getattr(item, "function", item)] = item
    for of_file in last_cases.values():
        for item in list(of_file.values())[::6]:
            if not item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.check)


def pytest_collection_finish() -> None:
    """What the imports and the collection made stays: no garbage collection has to look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For many tiny calls: threads that wait for each other cost more than they give."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def decide() -> Iterator[Callable[..., str]]:
    """`policies.decided` from here to the test's end; may be called again."""
    with ExitStack() as held:
        yield lambda **changes: held.enter_context(decided(**changes))


@pytest.fixture
def arithmetic(request: pytest.FixtureRequest, decide: Callable[..., str]) -> str:
    """See `cases.every_way`."""
    decide(arithmetic=request.param)
    return str(request.param)
