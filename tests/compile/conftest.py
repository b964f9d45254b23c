"""Kernels compiled for GPUs that are not here; such a process can no longer interpret."""

from __future__ import annotations

import pytest
import triton

if triton.knobs.runtime.interpret:
    raise pytest.UsageError(
        "tests/compile needs a process of its own, but TRITON_INTERPRET is set to interpret; "
        "run `pytest tests/compile` alone and without it"
    )
