"""Triton either interprets or compiles in a process, and the tests say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def collect(*folders, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", *folders],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("folders", [("interpreter", "compile"), ("compile", "interpreter")])
def test_one_process_cannot_do_both(folders):
    run = collect(*(f"tests/{folder}" for folder in folders))
    assert run.returncode != 0
    what = {"interpreter": "interprets", "compile": "compiles"}[folders[1]]
    message = f"what {what} Triton's kernels needs a process of its own"
    assert message in run.stdout + run.stderr


def test_one_that_interprets_cannot_compile():
    run = collect("tests/compile", TRITON_INTERPRET="1")
    assert run.returncode != 0
    assert "TRITON_INTERPRET is set" in run.stdout + run.stderr


def test_without_a_folder_neither_is_collected(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests/cpu"]
