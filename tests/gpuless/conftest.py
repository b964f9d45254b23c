"""The emulators' own tests. Triton either interprets or compiles in a process: with
TRITON_INTERPRET=1 these are the tests of what interprets, without it of what compiles."""

from __future__ import annotations

import os

import interpreting
import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
OF_INTERPRETING = ["test_program_order.py", "test_repairs.py", "test_sanitizer.py"]
OF_COMPILING = [
    "test_ahead_of_time.py", "test_hazards.py", "test_instructions.py", "test_processes.py",
]  # fmt: skip

collect_ignore = OF_COMPILING if INTERPRETS else OF_INTERPRETING
if INTERPRETS:
    interpreting.install()
    sanitizer = pytest.fixture(autouse=True, name="sanitizer")(interpreting.watched)
    poisoned = pytest.fixture(autouse=True)(interpreting.poisoned_memory)
