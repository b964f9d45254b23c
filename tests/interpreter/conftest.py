"""Kernels run by Triton's interpreter on CPU tensors; such a process can no longer compile."""

from __future__ import annotations

import interpreting
import pytest

interpreting.install()

sanitizer = pytest.fixture(autouse=True, name="sanitizer")(interpreting.watched)
poisoned = pytest.fixture(autouse=True)(interpreting.poisoned_memory)
