"""The kernels, built once for a run of the tests."""

from __future__ import annotations

import os
from pathlib import Path

import emulate
import pytest


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    given = os.environ.get("GPL_FAST_TEST_KERNELS")
    if given:
        return emulate.load(Path(given))
    folder = tmp_path_factory.mktemp("kernels", numbered=False)
    return emulate.load(emulate.build(folder, ("-O2", "-mavx2", "-mfma", "-mf16c")))
