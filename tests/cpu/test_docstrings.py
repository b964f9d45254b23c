"""The docstrings of what is public: shapes, refusals, sources and every keyword, and that what
looks for them (`lacking`) notices each that is missing."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest

import gpl_fast

TENSORS = re.compile(r"\b(Tensor|TargetLike|TargetMap|TargetFeatures|TopK|ClassWeight)\b")
# Where the keywords are that a docstring refers to.
REFERS = {"**gpl": "GenericPerceptualLoss", "**options": "GenericPerceptualLoss"}
# Not made by its own words, but in ways that name theirs.
WAYS = {"LossNet": ("vgg", "from_sequential", "from_module", "load", "with_input_adapter")}
LOOKS_AT_NOTHING = ("LossNet.network_input",)  # the losses have checked what comes


class Public(NamedTuple):
    name: str
    of: Any  # the class or the function
    method: bool = False

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.of.__doc__ or "")

    @property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.of)


def own_methods(kind: type) -> dict[str, Callable[..., Any]]:
    """Its public methods, and those of its bases in this package."""
    found: dict[str, Callable[..., Any]] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith("gpl_fast"):
            continue
        for name, value in vars(base).items():
            function = getattr(value, "__func__", value)
            if inspect.isfunction(function) and not name.startswith("_") and name != "extra_repr":
                found.setdefault(name, function)
    return found


def public() -> list[Public]:
    found = []
    for name in gpl_fast.__all__:
        x = getattr(gpl_fast, name)
        if isinstance(x, ModuleType):
            if x is not gpl_fast.reference:  # the oracle: shapes in prose, checks nothing
                functions = {k: f for k, f in vars(x).items() if inspect.isfunction(f)}
                found += [
                    Public(f"{name}.{k}", f)
                    for k, f in functions.items()
                    if f.__module__ == x.__name__ and not k.startswith("_")
                ]
            continue
        found.append(Public(name, x))
        if not issubclass(x, Exception):
            found += [Public(f"{name}.{k}", f, True) for k, f in own_methods(x).items()]
    return found


def section(doc: str, name: str) -> str:
    """What stands under ``name:``, or nothing."""
    found = re.search(rf"^{name}:\n((?:(?: +.*)?\n)*)", doc + "\n", re.M)
    return found[1].strip() if found else ""


def lacking(x: Public) -> list[str]:
    """What the docstring of `x` does not say."""
    if not x.doc:
        return ["docstring"]
    kind = inspect.isclass(x.of)
    if kind and issubclass(x.of, Exception):
        return []
    given = [str(p.annotation) for p in x.signature.parameters.values()]
    returned = str(x.signature.return_annotation)
    takes = any(map(TENSORS.search, given))
    wanted = []
    if kind or takes or TENSORS.search(returned):
        wanted.append("Shape")
    if (kind or takes) and x.name not in LOOKS_AT_NOTHING:
        wanted.append("Raises")
    if not x.method:
        wanted.append("Source")
    missing = [name for name in wanted if not section(x.doc, name)]
    kind_name, _, name = x.name.partition(".")
    if not x.method and x.name not in WAYS:
        missing += unnamed(x)
    elif name in WAYS.get(kind_name, ()):
        missing += [p for p in x.signature.parameters if p not in ("cls", "self", "path")
                    and not re.search(rf"\b{p}\b", x.doc)]  # fmt: skip
    return missing


def unnamed(x: Public) -> list[str]:
    """Keywords that neither the docstring nor the one that it refers to has a line for."""
    args = section(x.doc, "Args") + "\n" + section(x.doc, "Attributes")
    heads = re.findall(r"^ *([\w*]+(?:, [\w*]+)*):(?: |$)", args, re.M)
    named = {word for head in heads for word in head.split(", ")}
    missing = []
    for p in x.signature.parameters.values():
        stars = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "")
        if stars + p.name not in named:
            missing.append(stars + p.name)
        elif (told := REFERS.get(stars + p.name)) and not re.search(
            rf"`({told}|OptionWords)`", args
        ):
            missing.append(f"where {stars}{p.name} are")
    return missing


PUBLIC = public()


def test_all_that_is_public_is_found():
    names = {x.name for x in PUBLIC}
    assert names >= {
        "SegmentationLoss", "SegmentationLoss.count", "GenericPerceptualLoss.distance_map",
        "PerceptualLoss.forward", "LPIPS.from_module", "LossNet.vgg", "TopK.cat",
        "TargetFeatures.to", "TargetFeatures.load", "functional.encode", "BackendUnavailable",
    }  # fmt: skip
    assert not {name for name in names if name.endswith((".state_dict", ".train"))}


@pytest.mark.parametrize("x", PUBLIC, ids=lambda x: x.name)
def test_a_docstring_says_it_all(x):
    assert lacking(x) == []


def test_a_section_that_is_missing_is_noticed():
    noticed = dict.fromkeys(["Shape", "Raises", "Source"], 0)
    for x in PUBLIC:
        for name in noticed:
            found = lacking(without(name, x))
            assert found in ([], [name])
            noticed[name] += found == [name]
    assert noticed["Shape"] > 30
    assert noticed["Raises"] > 25
    assert noticed["Source"] == 4 + 7  # of the functions and the classes


def without(name: str, x: Public) -> Public:
    class Cut(Public):
        doc = re.sub(rf"^{name}:\n(?:(?: +.*)?\n)*", "", x.doc + "\n", flags=re.M)

    return Cut(*x)


def test_an_empty_section_is_none():
    assert section("Sum.\n\nShape:\n\nRaises:\n    ValueError: of it.", "Shape") == ""
    assert section("Sum.\n\nShape:\n    (N,)\nRaises:\n    Never.", "Shape") == "(N,)"


def test_a_keyword_that_is_missing_is_noticed():
    def f(pred, mask, widths, **options):
        """Sum.

        Args:
            pred: (N, C), of the ``mask: `` that there is.
            kernel_size, widths: of it.
            **options: some.
        """

    assert unnamed(Public("f", f)) == ["mask", "where **options are"]
    assert lacking(Public("f", f))[0] == "Source"
    f.__doc__ = None
    assert lacking(Public("f", f)) == ["docstring"]


def test_the_words_that_are_referred_to_stand_there():
    from gpl_fast.loss import GenericWords
    from gpl_fast.options import OPTION_NAMES

    kind = Public("GenericPerceptualLoss", gpl_fast.GenericPerceptualLoss)
    assert unnamed(kind) == []
    words = {*GenericWords.__annotations__, *OPTION_NAMES}
    assert words <= set(kind.signature.parameters)
