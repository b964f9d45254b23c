"""`LPIPS` by Triton's kernels, interpreted: the bounds of tests/cpu/test_lpips.py."""

from __future__ import annotations

import cpu_tests
import pytest
import torch

from gpl_fast.tiles import Tile

lpips_tests = cpu_tests.load("lpips")

SIZE, DRAWS = (9, 12), 9
TILE = Tile(16, 16, 16, 16, 4, 1, False)  # a map in one program, of which the interpreter does few

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("backend", "dtype", "kind"), lpips_tests.cells("fast", "triton"))
def test_value_and_gradient_by_definition(backend, dtype, kind, decide, monkeypatch):
    decide(forward="triton", backward="triton", arch=80, tiles=lambda *_: TILE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    lpips_tests.assert_exact(backend, dtype, kind, DRAWS, SIZE)


@pytest.mark.parametrize(
    ("backend", "dtype", "kind"),
    lpips_tests.cells("fast", "triton", (torch.float32, torch.float16), ("dense", "features")),
)
def test_a_map_and_its_gradient_by_definition(backend, dtype, kind, decide, monkeypatch):
    decide(forward="triton", backward="triton", arch=80, tiles=lambda *_: TILE)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    lpips_tests.assert_exact(backend, dtype, kind, DRAWS, SIZE, spatial=True)
