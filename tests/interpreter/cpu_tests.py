"""The tests of the CPU path as modules: what they prove of the operators, kernels must hold too."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


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
