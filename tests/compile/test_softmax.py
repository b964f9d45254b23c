"""The softmax kernels for sm_90 and others: what they issue, their grids, what a launch passes.

`pytest -s -k instructions` prints the thread-instructions an element.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace

import pytest
import test_kernels
from ahead_of_time import SPILLS_BY_CHOICE, check, compiling_for, disassembled
from instructions import loops, per_element
from test_kernels import BF16, FLOAT, LISTED, softmax_bwd, softmax_pack

from gpl_fast import kernels
from gpl_fast.kernels.logits import HELD, tiling
from gpl_fast.kernels.row_sums import row_sums
from gpl_fast.net.weights import padded_channels

PLAIN = {
    "layout": "nchw", "dtype": FLOAT, "maps": BF16, "activation": 1, "cross_entropy": "none",
    "masked": False,
}  # fmt: skip
EVERYTHING = {**PLAIN, "cross_entropy": "own", "masked": True}
LAUNCHES = {
    "softmax_pack_fwd": lambda **options: softmax_pack(kind="dense", **options),
    "softmax_bwd": softmax_bwd,
}


@pytest.fixture
def launches(monkeypatch):
    """Fills with (grid, how many tensors and numbers are passed) of what would be launched."""
    found = []

    def launch(kernel, grid, *args, **kwargs):
        named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        passed = [named[p.name] for p in kernel.params if not p.is_constexpr]
        flat = [a for arg in passed for a in (arg if isinstance(arg, tuple) else [arg])]
        found.append((grid, sum(a is not None for a in flat)))

    for stage in (kernels.softmax_pack_fwd, kernels.softmax_bwd, row_sums):
        monkeypatch.setattr(sys.modules[stage.__module__], "launch", launch)
    return found


# ---------------------------------------------------------------------------------- instructions

# Thread-instructions an element, of softmax_pack_fwd a class of a pixel in both maps, by the
# classes: of rows of 512 pixels, and of 769, whose logits begin anywhere. Triton 3.7.1.
FIGURES = {
    "softmax_pack_fwd": {
        19: (59.7, 51.6), 150: (37.8, 39.3), 847: (43.2, 45.7), 1203: (38.6, 41.4)
    },
    "softmax_bwd": {19: (44.6, 49.1), 150: (26.3, 32.8), 847: (32.0, 38.4), 1203: (29.5, 35.5)},
}  # fmt: skip
WIDTHS = (512, 769)
GOAL = 45  # with 150 classes


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("classes", FIGURES["softmax_bwd"])
@pytest.mark.parametrize("stage", FIGURES)
def test_instructions_of_an_element(stage, classes, width, monkeypatch):
    monkeypatch.setattr(test_kernels, "W", width)
    with compiling_for(90) as compiled:
        LAUNCHES[stage](**PLAIN, channels=classes)
    (kernel,) = compiled
    sass = disassembled(kernel.binary)
    assert loops(sass) == []  # all classes are held: each logit is read once
    programs = -(-width // tiling(classes, padded_channels(classes), width)["BLOCK_W"])
    figure = per_element(sass, (), kernel.warps * 32 * programs, width * classes)
    print(f"{stage}, {classes} classes, {width} pixels: {figure:.1f}, {kernel.registers} registers")
    assert (
        figure
        <= (1.05 if SPILLS_BY_CHOICE else 1.03) * FIGURES[stage][classes][WIDTHS.index(width)]
    )
    assert classes != 150 or figure <= GOAL


# -------------------------------------------------------------------------------------- registers


@pytest.mark.parametrize("classes", [256, HELD, HELD + 1])
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_no_spills_where_the_tiles_change(capability, classes, monkeypatch):
    """The most that a program holds of a tile's kind, and more than are held; all arguments, rows
    that begin anywhere."""
    monkeypatch.setattr(test_kernels, "W", 769)
    with compiling_for(capability) as compiled:
        softmax_pack(**EVERYTHING, kind="dense", channels=classes)
        softmax_bwd(**EVERYTHING, channels=classes)
    for each in compiled:
        # The assembler's choice: at 168 registers one more program fits than at 255.
        by_choice = SPILLS_BY_CHOICE and each.registers <= 168 and each.spills <= 64
        check(replace(each, spills=0) if by_choice else each, tensor_core=None, pipelined=False)
    with compiling_for(capability) as compiled:
        softmax_pack(**EVERYTHING, kind="topk and rest", channels=classes)
    for each in compiled:
        assert each.spills <= 128
        check(replace(each, spills=0), tensor_core=None, pipelined=False)


# ------------------------------------------------------------------------------ grids and arguments


def test_a_launch_fills_a_large_gpu(launches, monkeypatch):
    """132 multiprocessors, four programs each: also where the walk gives an image, or a strip."""
    for n, h in ((4, 512), (1, 512), (1, 66)):
        monkeypatch.setattr(test_kernels, "N", n)
        monkeypatch.setattr(test_kernels, "H", h)
        for launch in LAUNCHES.values():
            launch(**PLAIN, channels=1203)
    assert min(math.prod(grid) for grid, _ in launches) >= 4 * 132
    assert len(launches) == 6


FORMS = {
    "kind": ("none", "dense", *LISTED), "layout": ("nchw", "channels_last"),
    "activation": (0, 1, 2), "cross_entropy": ("none", "shared", "own"), "masked": (False, True),
}  # fmt: skip


def test_few_arguments_reach_the_launcher(launches):
    """Of any form: what it does not need is not passed."""
    for values in itertools.product(*FORMS.values()):
        form = dict(zip(FORMS, values, strict=True))
        if not test_kernels.no_extra(form):
            softmax_pack(dtype=FLOAT, maps=BF16, channels=150, **form)
            softmax_bwd(dtype=FLOAT, maps=BF16, channels=150, **without(form, "kind"))
    counts = [passed for _, passed in launches]
    print(f"{min(counts)} to {max(counts)} arguments")
    assert max(counts) <= 20


def test_sums_of_rows_are_compiled_by_powers_of_two_of_tiles(monkeypatch):
    with compiling_for(90) as compiled:
        for width in (200, 264, 328, 392):  # 4 to 7 tiles
            monkeypatch.setattr(test_kernels, "W", width)
            softmax_pack(kind="none", channels=19, **{**PLAIN, "cross_entropy": "shared"})
    sums = [c.assembly for c in compiled if c.kernel == "_row_sums_kernel"]
    assert (len(sums), len(set(sums))) == (4, 2)


def without(form: dict, *names: str) -> dict:
    return {name: value for name, value in form.items() if name not in names}
