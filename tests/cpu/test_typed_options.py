"""Every keyword of every public loss is typed: editors complete it, mypy checks it."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

from gpl_fast import GenericPerceptualLoss, PerceptualLoss, SegmentationLoss, functional
from gpl_fast.loss import GenericWords
from gpl_fast.options import LabelWords, Options, OptionWords

ROOT = Path(__file__).resolve().parents[2]


def test_the_words_are_the_options():
    assert {*get_type_hints(OptionWords)} == {f.name for f in fields(Options) if f.init}
    assert {*get_type_hints(LabelWords)} == {*get_type_hints(OptionWords)} - {"reduction"}


def test_the_words_are_the_constructors():
    """Names and types; `SegmentationLoss` has its own channels and ignored label."""
    taken = get_type_hints(GenericPerceptualLoss.__init__)
    generic = get_type_hints(GenericWords)
    assert generic == {k: taken[k] for k in generic}
    assert {*taken} - {*generic} == {"in_channels", "ignore_index", "return"}
    words = get_type_hints(OptionWords)
    assert words == {k: taken[k] for k in words}


@pytest.mark.parametrize(
    ("taker", "words"),
    [
        (SegmentationLoss.__init__, GenericWords),
        (PerceptualLoss.__init__, LabelWords),
        (functional.generic_perceptual_loss, OptionWords),
        (functional.segmentation_loss, OptionWords),
        (functional.perceptual_loss, OptionWords),
        (functional.encode, OptionWords),
    ],
)
def test_what_takes_which_words(taker, words):
    """A keyword of the function's own is none of the words."""
    rest = inspect.getfullargspec(taker).varkw
    assert get_type_hints(taker)[rest].__args__ == (words,)
    assert not {*inspect.signature(taker).parameters} & {*get_type_hints(words)}


# Lines that end in "# no" are errors, no others are.
SNIPPET = """
import numpy
import torch
from gpl_fast import GenericPerceptualLoss, LossNet, PerceptualLoss, SegmentationLoss, functional
x = y = torch.zeros(1)
net = LossNet.vgg(3)
GenericPerceptualLoss(3, "vgg11", temperature=2, level_weights=[1, 0.5], workspace_mb="auto")
GenericPerceptualLoss(3, temperature=torch.tensor(2.0), compute_dtype="bfloat16", seed=1)
GenericPerceptualLoss(3, temprature=2)  # no
GenericPerceptualLoss(3, temperature="2")  # no
GenericPerceptualLoss(3, reduction=None)  # no
SegmentationLoss(3, gpl_weight=0.1, net=net, widths=(8,), ignore_index=None, backend="fast")
SegmentationLoss(3, class_weight=[1, 2, 3], temperature=numpy.float32(2), reduction="none")
SegmentationLoss(3, kernel_sise=3)  # no
SegmentationLoss(3, kernel_size="3")  # no
SegmentationLoss(3, in_channels=3)  # no
SegmentationLoss(3, level_weights=1)  # no
PerceptualLoss(net, {"relu1_1": 1}, activation="none", ignore_index=255, workspace_mb=64)
PerceptualLoss(net, level_weights=[1])  # no
PerceptualLoss(net, compute_dtype=16)  # no
functional.generic_perceptual_loss(x, y, net, level_weights=(1,), activation="sigmoid")
functional.generic_perceptual_loss(x, y, net, activatoin="sigmoid")  # no
functional.generic_perceptual_loss(x, [y], net)  # no
functional.segmentation_loss(x, y, net, teacher=None, label_smoothing=0.1, reduction="sum")
functional.segmentation_loss(x, y, net, temperature=None)  # no
functional.perceptual_loss(x, y, net, feature_layers={}, style_layers={"relu1_1": 1.0})
functional.perceptual_loss(x, y, net, feature_layers={}, style_layers={}, seed=0)  # no
functional.encode(x, net, ["relu1_1"], target_activation="none")
functional.encode(x, net, ["relu1_1"], target_activation=1)  # no
"""


@pytest.mark.slow
def test_mypy_checks_every_keyword(monkeypatch):
    api = pytest.importorskip("mypy.api")
    monkeypatch.chdir(ROOT)
    out, errors, _ = api.run(
        ["--config-file=", "--strict", "--follow-imports=silent", "-c", SNIPPET]
    )
    found = {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line}
    lines = SNIPPET.splitlines()
    assert found == {i for i, line in enumerate(lines, 1) if line.endswith("# no")}, out + errors
