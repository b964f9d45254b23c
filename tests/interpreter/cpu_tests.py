"""The tests of the CPU path as modules: what they prove of the operators, kernels must hold too."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from gpl_fast import kernels, ops

RENAMED = {"H": "height", "W": "width"}


class Kernels:
    """The kernels for callers that give arguments by position, in the operators' order."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        stage = getattr(kernels, name)
        names = [RENAMED.get(a.name, a.name) for a in getattr(ops, name)._schema.arguments]

        def call(*args, **options):
            given = dict(zip(names, args, strict=False)) | options
            return stage(given.pop(names[0]), **given)

        return call


def load(name: str) -> ModuleType:
    """``tests/cpu/test_<name>.py`` as a module of its own, so that names in it can be replaced."""
    path = Path(__file__).parents[1] / "cpu" / f"test_{name}.py"
    spec = importlib.util.spec_from_file_location(f"cpu_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module
