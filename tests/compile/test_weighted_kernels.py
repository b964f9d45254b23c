"""The kernels that read a mask, as Triton compiles them for weights of pixels: test_kernels.py asks
the same of those without."""

from __future__ import annotations

from dataclasses import replace

import pairwise
import pytest
import test_kernels
from ahead_of_time import CAPABILITIES, check, compiling_for
from test_kernels import BF16, FLOAT, HALF, LISTED, but_for_occupancy, compiled_once, name

PACK = {
    **test_kernels.PACK,
    "kind": ("none", "dense", *LISTED),
    "channels": (19, 150),
    "masked": ("weights",),
}
BWD = {key: PACK[key] for key in PACK if key != "kind"}
LOOK_UP = {
    "capability": CAPABILITIES,
    "stage": LISTED,
    "dtype": (BF16, FLOAT, HALF),
    "c": (64, 21),
}
BLOCK = {
    "capability": CAPABILITIES,
    "form": LISTED,
    "dtype": (BF16, HALF),
    "pool": ("max", "avg", "none"),
    "kernel": (3, 5),
    "masked": ("weights",),
}


def cases(factors: dict, excluded=lambda case: False):
    return pytest.mark.parametrize(
        "case", pairwise.covering(factors, excluded, lambda case: 0.0), ids=name
    )


@cases(PACK, test_kernels.no_extra)
def test_softmax_pack(case):
    options = dict(case)
    with compiling_for(options.pop("capability")) as compiled:
        test_kernels.softmax_pack(**options)
    for each in compiled:
        each = but_for_occupancy(each, case["kind"])
        # At 128 registers or less, where more programs fit, the assembler moves a few bytes by
        # choice: 16 of labels behind logits in channels_last, on sm_100.
        few = 16 if each.registers <= 128 else 0
        each = replace(each, spills=max(each.spills - few, 0))
        check(each, tensor_core=None, pipelined=False)


@cases(BWD, test_kernels.no_extra)
def test_softmax_bwd(case):
    options = dict(case)
    capability = options.pop("capability")
    compiled = compiled_once(capability, lambda: test_kernels.softmax_bwd(**options))
    check(compiled, tensor_core=None, pipelined=False)


@cases(LOOK_UP)
def test_look_ups(case):
    launch = test_kernels.small_stages(case["dtype"], case["c"], weighted=True)[case["stage"]]
    compiled = but_for_occupancy(compiled_once(case["capability"], launch), case["stage"])
    check(compiled, tensor_core=None, pipelined=False)


@cases(BLOCK)
def test_conv_block(case):
    options = dict(case)
    test_kernels.check_conv_block(options.pop("capability"), options)
