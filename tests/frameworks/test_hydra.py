"""examples/hydra_segmentation.py, and what docs/frameworks/hydra.md says."""

from __future__ import annotations

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from recipes import EXAMPLES, recipe, run_recipe

import gpl_fast

CONFIG = OmegaConf.load(EXAMPLES / "hydra_segmentation.yaml")


def test_the_loss_falls():
    values = recipe("hydra_segmentation").train(CONFIG)
    assert values[-1] < 0.9 * values[0]


def test_the_command_line_overrides():
    printed = run_recipe("hydra_segmentation", "loss.gpl_weight=0.3", "steps=2")
    assert "gpl_weight: 0.3" in printed


def test_it_is_the_loss_that_python_makes():
    made = hydra.utils.instantiate(CONFIG.loss)
    plain = gpl_fast.SegmentationLoss(
        3, gpl_weight=0.1, net="1,1,1,1", level_weights=(0, 0, 0.5, 1),
        compute_dtype=torch.bfloat16,
    )  # fmt: skip
    assert made.fingerprint() == plain.fingerprint()
    logits, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    assert torch.equal(made(logits, labels), plain(logits, labels))


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ({"class_weight": [1.0, 2.0, 0.5]}, {"class_weight": torch.tensor([1.0, 2.0, 0.5])}),
        ({"ignore_index": [0, 255]}, {"ignore_index": (0, 255)}),
        ({"gpl_weight": "${lam}", "lam": 0.3}, {"gpl_weight": 0.3}),
        ({"temperature": 1e-1}, {"temperature": 0.1}),
    ],
    ids=["a list of weights", "several labels", "interpolation", "an exponent"],
)
def test_configurations_stand_for_pythons_values(words, same):
    config = OmegaConf.create({"_target_": "gpl_fast.SegmentationLoss", "num_classes": 3, **words})
    lam = config.pop("lam", None)
    root = OmegaConf.create({"lam": lam, "loss": config})
    made = hydra.utils.instantiate(root.loss)
    logits, labels = torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32))
    assert torch.equal(made(logits, labels), gpl_fast.SegmentationLoss(3, **same)(logits, labels))


def test_a_number_in_yaml_is_no_text():
    """``net: 1`` is an integer; one block is ``net: [1]`` or ``net: "1"``."""
    config = {"_target_": "gpl_fast.SegmentationLoss", "num_classes": 3}
    with pytest.raises(Exception, match="net"):
        hydra.utils.instantiate({**config, "net": 1})
    made = hydra.utils.instantiate({**config, "net": [1]})
    assert made.fingerprint() == gpl_fast.SegmentationLoss(3, net="1").fingerprint()
