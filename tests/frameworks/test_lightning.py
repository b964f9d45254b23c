"""examples/lightning_segmentation.py, and what docs/frameworks/lightning.md says."""

from __future__ import annotations

import re

import lightning as L
import pytest
import torch
from recipes import EXAMPLES, recipe, run_recipe

import gpl_fast

CONFIG = ["fit", "--config", str(EXAMPLES / "lightning_segmentation.yaml")]
lightning_segmentation = recipe("lightning_segmentation")
Segmenter, Scenes = lightning_segmentation.Segmenter, lightning_segmentation.Scenes


def fit(model: L.LightningModule, data: L.LightningDataModule, **words: object) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **{"max_epochs": 1, **words},
    )  # fmt: skip
    trainer.fit(model, data)
    return trainer


def segmenter(kind: type = Segmenter, **words: object) -> L.LightningModule:
    torch.manual_seed(0)
    return kind(gpl_fast.SegmentationLoss(3), **words)


@pytest.fixture(scope="module")
def fitted() -> tuple[L.LightningModule, L.Trainer]:
    model = segmenter()
    return model, fit(model, Scenes(), max_epochs=3, precision="bf16-mixed")


def test_the_loss_falls_and_its_parts_are_logged(fitted):
    _, trainer = fitted
    before = fit(segmenter(lr=0.0), Scenes()).callback_metrics["val/loss"]
    after = trainer.callback_metrics
    assert after["val/loss"] < 0.8 * before
    assert {"train/loss_ce", "train/loss_gpl"} <= set(after)


def test_the_checkpoint_holds_the_student_alone(fitted, tmp_path):
    model, trainer = fitted
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state
    assert all(name.startswith("student.") for name in state)
    fresh = segmenter()
    fresh.load_state_dict(state, strict=True)
    assert torch.equal(fresh.student[0].weight, model.student[0].weight)


def test_saved_hyperparameters_need_the_loss_left_out(tmp_path):
    """A loss among the hyperparameters is pickled into the checkpoint, which `torch.load` with
    ``weights_only=True`` then refuses."""

    class Saving(Segmenter):
        def __init__(self, loss, ignore):
            super().__init__(loss)
            self.save_hyperparameters(ignore=ignore)

    for ignore, loads in ((["loss"], True), ([], False)):
        trainer = fit(segmenter(Saving, ignore=ignore), Scenes(images=4))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        if loads:
            torch.load(tmp_path / "last.ckpt", weights_only=True)
        else:
            with pytest.raises(Exception, match="weights_only"):
                torch.load(tmp_path / "last.ckpt", weights_only=True)


def weights_after(model: L.LightningModule, **words: object) -> torch.Tensor:
    batch_size = words.pop("batch_size")
    fit(model, Scenes(batch_size=batch_size), **words)
    return torch.nn.utils.parameters_to_vector(model.student.parameters()).detach()


def test_accumulation_with_counts_is_the_large_batch_and_lightnings_a_mean_of_means():
    large = weights_after(segmenter(), batch_size=16)
    pieces = segmenter(lightning_segmentation.Accumulating, pieces=4)
    with_counts = (weights_after(pieces, batch_size=4) - large).norm()
    of_means = (weights_after(segmenter(), batch_size=4, accumulate_grad_batches=4) - large).norm()
    assert with_counts < 1e-5 * large.norm()
    assert of_means > 20 * with_counts


def test_under_bf16_mixed_the_network_runs_in_bfloat16_unless_told_otherwise():
    seen = {}

    class Looking(Segmenter):
        def training_step(self, batch, index):
            images, labels = batch
            assert torch.is_autocast_enabled("cpu")
            logits = self.student(images).float().detach()
            for dtype in (None, "float32"):
                loss = gpl_fast.SegmentationLoss(3, compute_dtype=dtype)
                seen[dtype] = loss.explain(logits, labels).compute_dtype
                seen[dtype, "value"] = loss(logits, labels, return_parts=True)["loss_gpl"]
            with torch.autocast("cpu", enabled=False):
                plain = gpl_fast.SegmentationLoss(3)(logits, labels, return_parts=True)
            seen["plain"] = plain["loss_gpl"]
            return super().training_step(batch, index)

    fit(segmenter(Looking), Scenes(images=4), precision="bf16-mixed", num_sanity_val_steps=0)
    assert torch.equal(seen["float32", "value"], seen["plain"])
    assert not torch.equal(seen[None, "value"], seen["plain"])
    torch.testing.assert_close(seen[None, "value"], seen["plain"], rtol=0.05, atol=1e-6)


def test_a_yaml_configuration_makes_the_loss(capsys):
    model = lightning_segmentation.main([*CONFIG, "--trainer.max_epochs", "1"])
    asked = gpl_fast.SegmentationLoss(3, net="1,1,1,1")
    assert model.loss.fingerprint() == asked.fingerprint()
    assert "loss_gpl" in capsys.readouterr().out


def test_two_processes_take_the_steps_of_one():
    """A step is of all images, of which each has half; counts are reduced over the processes."""
    options = ["--model", "Accumulating", "--trainer.precision", "32-true"]
    one = run_recipe("lightning_segmentation", *CONFIG, *options, "--model.pieces", "8")
    two = run_recipe(
        "lightning_segmentation", *CONFIG, *options, "--model.pieces", "4",
        "--trainer.strategy", "ddp", "--trainer.devices", "2", processes=2,
    )  # fmt: skip

    one, two = (
        [float(norm) for norm in re.findall(r", student ([0-9.]+)", text)] for text in (one, two)
    )
    assert len(two) == 2
    assert two == pytest.approx(one * 2, rel=1e-5)
