"""Kernels compiled for GPUs that are not here; such a process can no longer interpret."""

from __future__ import annotations

import ahead_of_time  # noqa: F401  it asks for a process of its own
