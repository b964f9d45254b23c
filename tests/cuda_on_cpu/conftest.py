"""The kernels, built once for a run of the tests, as two GPUs would run them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # test_chained goes through both halves

import emulate
import operators
import pytest
import repairs
import torch

repairs.install()

SHARED_KIB = {80: 163, 90: 227}


def pytest_collection_modifyitems(config, items):
    """float32 has no kernels of its own for sm_90."""
    twins = [
        item
        for item in items
        if hasattr(item, "callspec")
        and item.callspec.params.get("kernels") == 90
        and item.callspec.params.get("dtype") == torch.float32
    ]
    items[:] = [item for item in items if item not in twins]
    config.hook.pytest_deselected(items=twins)


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    given = os.environ.get("GPL_FAST_TEST_KERNELS")
    if given:
        return emulate.load(Path(given))
    objects = emulate.kernels(emulate.CONVOLUTIONS)
    return emulate.load(emulate.build(tmp_path_factory.mktemp("kernels"), objects, "kernels.cpp"))


@pytest.fixture
def phases(kernels):
    """Function: (passes over shared memory of the last launch, the fewest there can be)."""

    def counted():
        found = kernels.counters()
        assert found["ldmatrix"] > 0
        assert found["shared"] > 0
        least = found["ldmatrix"] + found["shared"]
        return found["ldmatrix_phases"] + found["shared_phases"], least

    kernels.count_shared(True)
    yield counted
    kernels.count_shared(False)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """torch.ops.gpl_fast_emulated."""
    return operators.load(tmp_path_factory.mktemp("operators"))


@pytest.fixture(params=sorted(SHARED_KIB))
def kernels(built, request):
    built.play(request.param, SHARED_KIB[request.param])
    return built


@pytest.fixture(autouse=True)
def _as_on_a_gpu(decide):
    """Where a CPU stands for a GPU, convolutions are in the maps' dtype."""
    decide(arithmetic="own")
