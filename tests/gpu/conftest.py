"""Everything here needs a CUDA device; GPL_FAST_TEST_DEVICE=cpu runs what can run without one.

Then sizes are small, and streams, graphs and devices are left out: it proves the tests, not the
kernels.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
DEVICE = os.environ.get("GPL_FAST_TEST_DEVICE", "cuda")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = DEVICE == "cuda" and not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if "small" in item.name:
                item.add_marker(pytest.mark.check)
            if missing:
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for what only CUDA has."""
    if device.type != "cuda":
        pytest.skip(f"{device.type} has no streams, graphs and second devices")
    return device


@pytest.fixture
def second_device(cuda: torch.device) -> torch.device:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one CUDA device")
    return torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def settings():
    """Seeds, and true float32 unless a test asks for TF32."""
    torch.manual_seed(0)
    if (
        DEVICE == "cpu"
    ):  # many tiny calls: threads that wait for each other cost more than they give
        torch.set_num_threads(1)
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed
