"""Looking at a target's values: when it is allowed, and the operators that do.

Operators, so that looking works inside torch.compile(fullgraph=True); defined by hand, because
`torch.library.custom_op` would import torch._dynamo at the first call: seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpl_fast import environment

_LIBRARY: Any = torch.library.Library("gpl_fast", "FRAGMENT")  # type: ignore[no-untyped-call]


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``torch.ops.gpl_fast.<name>`` of a schema ``"name(...) -> ..."``.

    Args:
        run: on tensors of any device.
        fake: shapes and dtypes alone.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"gpl_fast::{name}", fake, lib=_LIBRARY)


def may_look(t: Tensor) -> bool:
    """Whether values may be read: on the CPU, or where GPL_FAST_CHECK=1 accepts the sync."""
    if t.is_meta:
        return False
    return t.device.type == "cpu" or environment.value("GPL_FAST_CHECK") == "1"
