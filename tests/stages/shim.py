"""The stages' keywords on operators and launchers that want every argument, by older names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

OLDER = {"height": "H", "width": "W"}
NEUTRAL = {"label_smoothing": 0.0}


def complete(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords that `function` wants; what is left out is None or 0."""
    wanted = _parameters(function)
    given = {OLDER[n] if OLDER.get(n) in wanted else n: v for n, v in options.items()}
    needed = [name for name, has_default in list(wanted.items())[1:] if not has_default]
    return given | {name: NEUTRAL.get(name) for name in needed if name not in given}


def by_keyword(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(first, keyword=...)`"""
    has_tile = "tile" in _parameters(function)

    def call(first: Any, **options: Any) -> Any:
        if has_tile or "tile" not in options:
            return function(first, **complete(function, options))
        module = importlib.import_module("gpl_fast.kernels.conv_block")
        tile = options.pop("tile")
        with mock.patch.object(module, "tile_for", return_value=tile):
            return function(first, **complete(function, options))

    return call


def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """Each name, and whether it may be left out."""
    if hasattr(function, "_schema"):
        return {a.name: a.has_default_value() for a in function._schema.arguments}
    parameters = inspect.signature(function).parameters
    return {n: p.default is not p.empty for n, p in parameters.items()}
