"""Makes Triton interpret in this process."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Iterator

import pytest
import torch


@functools.cache
def repaired() -> None:
    """Before anything imports Triton: it interprets, as a GPU would compute.

    Raises:
        pytest.UsageError: Triton is there already, to compile: it cannot do both.
    """
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError(
            "what interprets Triton's kernels needs a process of its own, but Triton is already "
            "imported to compile: run the folder alone"
        )
    os.environ["TRITON_INTERPRET"] = "1"
    import repairs

    repairs.install()


@functools.cache
def install() -> None:
    """The same with programs in any order, and every launch watched."""
    repaired()
    import program_order
    import sanitizer

    program_order.install()
    sanitizer.install()


def watched() -> Iterator:
    """What kernels do in a test, as a fixture's body: the sanitizer, which forgets at both ends."""
    import sanitizer

    sanitizer.current.forget()
    yield sanitizer.current
    sanitizer.current.forget()


def poisoned_memory() -> Iterator[None]:
    """As a fixture's body: `torch.empty` is NaN, or the largest integer, as it may be on a GPU."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
