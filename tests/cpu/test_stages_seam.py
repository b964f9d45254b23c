"""`gpl_fast.stages` says what the compiled operators and Triton's kernels offer: so they do."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpl_fast import ops, stages

CSRC = Path(__file__).parents[2] / "csrc"
OF_OPERATORS = (stages.CpuStages, stages.CudaStages)


def methods(*protocols: type) -> dict[str, inspect.Signature]:
    """Signatures, without self, of what the protocols ask for."""
    found = {}
    for protocol in protocols:
        for name, function in inspect.getmembers(protocol, inspect.isfunction):
            if name.startswith("_"):
                continue
            _, *parameters = inspect.signature(function).parameters.values()
            returned = inspect.signature(function).return_annotation
            found[name] = inspect.Signature(parameters, return_annotation=returned)
    return found


@pytest.mark.parametrize(
    ("enum", "codes"),
    [
        ("Activation", stages.ACTIVATIONS),
        ("Pool", stages.POOLS),
        ("Criterion", stages.CRITERIA),
    ],
)
def test_codes_are_those_of_csrc(enum, codes):
    text = "\n".join(path.read_text() for path in sorted(CSRC.rglob("*.h")))
    (members,) = re.findall(rf"enum class {enum}\b[^{{]*\{{([^}}]*)\}}", text)
    names = [re.fullmatch(r"k(\w+)", member.strip())[1].lower() for member in members.split(",")]
    assert {name or "none": code for name, code in codes.items()} == {
        name: code for code, name in enumerate(names)
    }


def test_the_first_argument_is_positional_and_all_others_go_by_keyword():
    as_they_are = {"winograd_weight", "winograd", "direct_weight", "direct_conv", "populate"}
    for name, signature in methods(*OF_OPERATORS, stages.TritonStages).items():
        kinds = [p.kind for p in signature.parameters.values()]
        if name not in as_they_are:
            assert kinds[0] == inspect.Parameter.POSITIONAL_OR_KEYWORD
            assert set(kinds[1:]) <= {inspect.Parameter.KEYWORD_ONLY}


@pytest.mark.parametrize("name", methods(*OF_OPERATORS))
def test_operators_have_these_arguments(name):
    if (reason := ops.load()) is not None:
        pytest.skip(reason)
    wanted = methods(*OF_OPERATORS)[name].parameters
    schema = getattr(ops, name)._schema.arguments
    assert {a.name for a in schema} == set(wanted)
    assert schema[0].name == next(iter(wanted))
    for argument in schema:
        if argument.has_default_value():
            assert argument.default_value == wanted[argument.name].default


def test_the_library_has_no_other_operators():
    assert set(ops._NAMES) - set(ops._TEXTS) == set(methods(*OF_OPERATORS))


def test_tritons_launchers_have_these_signatures():
    kernels = pytest.importorskip("gpl_fast.kernels", reason="the GPU's kernels need Triton")
    wanted = methods(stages.TritonStages)
    assert set(kernels.__all__) == set(wanted)
    for name, signature in wanted.items():
        assert inspect.signature(getattr(kernels, name)) == signature, name


def test_a_tile_is_chosen_without_triton():
    lines = (
        "import sys",
        "from gpl_fast import stages, tiles",
        "tiles.choose(90, 'bfloat16', 'diff', 64, 128, 1)",
        "assert 'triton' not in sys.modules",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
