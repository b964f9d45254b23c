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
    first of its cases; tests/stages chooses its own. What is slow is left out."""
    functions: dict[Path, dict[object, None]] = collections.defaultdict(dict)
    for item in items:
        of_file, function = functions[item.path], getattr(item, "function", item)
        first_case = function not in of_file
        of_file[function] = None
        chosen = first_case and (len(of_file) - 1) % 6 == 0
        if chosen and item.path.parent.name != "stages" and not item.get_closest_marker("slow"):
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
