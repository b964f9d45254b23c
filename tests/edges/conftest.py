"""What a compiled test leaves behind, sizes seen and graphs kept, is not the next one's."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
