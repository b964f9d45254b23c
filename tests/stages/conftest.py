"""One suite of tests for whoever computes a stage; see `implementations`.

pytest tests/stages                          whatever this machine can do without a GPU
pytest tests/stages --implementation triton  one of them
pytest tests/stages --implementation gpu     on a GPU
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import emulate
import interpreting
import pytest
import torch

from gpl_fast import ops


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--implementation", action="append", choices=("cpu", "triton", "cuda", "gpu"),
        help="who computes the stages; several times for several",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*stages): what an implementation has to have")
    config.addinivalue_line("markers", "only(*names): implementations that it is about")
    config.addinivalue_line("markers", "every_case: not only the diagonal, whoever computes it")
    config.addinivalue_line("markers", "against_cpu: not of the CPU's operators themselves")
    # A GPU is silent on infinities and NaN.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    if "triton" in chosen(config):
        interpreting.install()


def chosen(config: pytest.Config) -> tuple[str, ...]:
    """Asked for, or what can be done here."""
    if (asked := config.getoption("implementation")) is not None:
        return tuple(asked)
    there = {"triton": importlib.util.find_spec("triton"), "cuda": emulate.missing() is None}
    return ("cpu", *(name for name, found in there.items() if found))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "stages" not in metafunc.fixturenames:
        return
    if (reason := ops.load()) is not None:
        pytest.skip(reason, allow_module_level=True)
    from implementations import offered

    marks = metafunc.definition.iter_markers
    needed = {stage for mark in marks("needs") for stage in mark.args}
    only = set(next((mark.args for mark in marks("only")), ()))  # the test's own first
    others = {"cpu"} if any(marks("against_cpu")) else set()
    found = [
        one
        for kind in chosen(metafunc.config)
        for one in offered(kind, needed)
        if kind not in others and (not only or only & {kind, one.name})
    ]
    names = [one.name for one in found]
    metafunc.parametrize("stages", found or [None], ids=names or ["nobody"], indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what nobody here has, twins, and of what Triton takes seconds for all but the
    diagonal."""
    ours = [item for item in items if "stages" in getattr(item, "fixturenames", ())]
    left_out = {item for item in ours if _left_out(item)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))
    _mark(item for item in ours if item not in left_out)


def _mark(items: Iterable[pytest.Item]) -> None:
    """The first case of each test is of the cross-section. A GPU's Triton does the others slowly,
    each by kernels of its own to compile."""
    seen = set()
    for item in items:
        name = item.callspec.params["stages"].name
        on_gpu, first = name.startswith("gpu"), (item.function, name) not in seen
        seen.add((item.function, name))
        if first:
            item.add_marker(pytest.mark.check)
        elif name == "gpu-triton":
            item.add_marker(pytest.mark.slow)
        if on_gpu:
            item.add_marker(pytest.mark.gpu)


def _left_out(item: pytest.Item) -> bool:
    one, dtype = item.callspec.params["stages"], item.callspec.params.get("dtype")
    if one is None:
        return True
    if one.name.endswith("90") and dtype == torch.float32:
        return True  # float32 has no kernel of its own for sm_90
    whole = item.get_closest_marker("every_case") is not None
    return one.name.endswith("triton") and not whole and not _on_diagonal(item)


def _on_diagonal(item: pytest.Item) -> bool:
    """Of as few cases of a test as have every value of every parameter."""
    places = []  # (which value, of how many) of each parametrisation
    for mark in item.iter_markers("parametrize"):
        names, values = mark.args
        names = names.replace(",", " ").split() if isinstance(names, str) else names
        here = [item.callspec.params[name] for name in names]
        each = [list(v) if len(names) > 1 else [v] for v in values]
        is_here = [all(a is b or a == b for a, b in zip(here, v, strict=True)) for v in each]
        places.append((is_here.index(True), len(each)))
    longest = range(max((size for _, size in places), default=1))
    return any(all(index == i % size for index, size in places) for i in longest)


@pytest.fixture
def stages(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An implementation: `stages.<name>(first, keyword=...)`."""
    with request.param.playing():
        yield request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    """Also where tests/conftest.py is not loaded: by tests/gpu/pytest.ini."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _watched(request: pytest.FixtureRequest) -> Iterator[None]:
    """Where Triton interprets: by the sanitizer, from poisoned memory."""
    if "triton" not in chosen(request.config):
        yield
        return
    for _ in zip(interpreting.watched(), interpreting.poisoned_memory(), strict=True):
        yield


@pytest.fixture
def cpu() -> Any:
    """The CPU's operators, whose bits others are to have."""
    from implementations import cpu

    return cpu()[0]
