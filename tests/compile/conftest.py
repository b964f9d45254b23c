"""Kernels compiled for GPUs that are not here; such a process can no longer interpret."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise pytest.UsageError(
        "tests/compile needs a process of its own, but TRITON_INTERPRET is set to interpret; "
        "run `pytest tests/compile` alone and without it"
    )

pytest.importorskip("triton", reason="Triton is not installed")
