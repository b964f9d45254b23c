"""examples/transformers_segformer.py, gpl_fast.integrations.transformers, and what
docs/frameworks/transformers.md says of the Trainer."""

from __future__ import annotations

import re

import pytest
import torch
from recipes import recipe, run_recipe
from transformers import Trainer, TrainingArguments

import gpl_fast
from gpl_fast.integrations.transformers import SegmentationTrainer

example = recipe("transformers_segformer")


def losses(rows: list[dict]) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_the_loss_falls_and_evaluation_has_one(tmp_path):
    rows = example.main(str(tmp_path), optim="adamw_torch", num_train_epochs=4)
    values = losses(rows)
    assert values[-1] < 0.9 * values[0]
    assert 0 < rows[-1]["eval_loss"] < values[0]


def test_accumulation_logs_and_takes_the_steps_of_the_large_batch(tmp_path):
    pieces = losses(example.main(str(tmp_path), batch_size=2, accumulate=4))
    large = losses(example.main(str(tmp_path), batch_size=8, accumulate=1))
    assert len(pieces) == len(large) == 6
    assert pieces == pytest.approx(large, rel=2e-3)


def test_two_processes_take_and_log_the_steps_of_one():
    one = re.findall(r"^loss .*", run_recipe("transformers_segformer", "2", "4"), re.M)
    two = re.findall(r"^loss .*", run_recipe("transformers_segformer", "2", "2", processes=2), re.M)
    assert two[0] == two[1]
    *expected, evaluated = numbers(one[0])
    *found, by_two = numbers(two[0])
    assert found == pytest.approx(expected, rel=3e-4)
    assert by_two == pytest.approx(evaluated, rel=0.05)  # a process has running means of its own


def numbers(line: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d\.\d+", line)]


def trainer_of(folder, loss, model=None, **words) -> SegmentationTrainer:
    """Of one step; it shows each step's loss."""
    return SegmentationTrainer(
        model or example.segformer(8),
        TrainingArguments(
            str(folder),
            **{"max_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
               "logging_steps": 1, **words},
        ),
        train_dataset=example.Squares(8), eval_dataset=example.Squares(4), loss=loss,
    )  # fmt: skip


def test_evaluation_counts_255_as_ignored_though_the_trainer_does_not(tmp_path):
    """Where a model's forward takes ``**kwargs`` the Trainer counts there by itself."""
    torch.manual_seed(0)
    loss = gpl_fast.SegmentationLoss(example.CLASSES)
    trainer = trainer_of(tmp_path, loss, per_device_eval_batch_size=4)
    assert trainer.model_accepts_loss_kwargs
    samples = [example.Squares()[i] for i in range(4)]
    images, labels = (
        torch.stack([each[name] for each in samples]) for name in ("pixel_values", "labels")
    )
    assert (labels == 255).any()
    found = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(loss(trainer.model(images).logits, labels).item(), rel=1e-5)


@pytest.mark.parametrize("ours", [False, True])
def test_a_mean_in_compute_loss_func_is_multiplied_by_the_number_of_processes(
    tmp_path, monkeypatch, ours
):
    """By `average_tokens_across_devices`, the default; in `SegmentationTrainer` it is not."""
    loss = gpl_fast.SegmentationLoss(example.CLASSES)
    trainer = trainer_of(tmp_path, loss)
    if not ours:
        trainer = Trainer(
            trainer.model,
            trainer.args,
            compute_loss_func=lambda outputs, labels, num_items_in_batch: loss(
                outputs.logits, labels
            ),
        )
    batch = {name: value[None] for name, value in example.Squares()[1].items()}
    found = []
    for processes in (1, 2):
        counted = property(lambda _, processes=processes: processes)
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", counted)
        count = torch.tensor([4096.0, 1.0])
        found.append(trainer.compute_loss(trainer.model, dict(batch), False, count).item())
    assert found[1] == pytest.approx((1 if ours else 2) * found[0], rel=1e-5)


def test_label_smoothing_factor_of_the_trainer_is_not_the_loss_s(tmp_path):
    def first(smoothing: float, **words: float) -> float:
        torch.manual_seed(0)
        loss = gpl_fast.SegmentationLoss(example.CLASSES, label_smoothing=smoothing)
        trainer = trainer_of(tmp_path, loss, **words)
        trainer.train()
        return losses(trainer.state.log_history)[0]

    plain = first(0.0)
    assert first(0.0, label_smoothing_factor=0.3) == plain
    assert first(0.3) != pytest.approx(plain, rel=1e-4)


def test_torch_compile_leaves_the_loss_the_same(tmp_path):
    """The Trainer compiles the model; the loss runs behind it."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        loss = gpl_fast.SegmentationLoss(example.CLASSES)
        words = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_of(tmp_path, loss, **words)
        trainer.train()
        assert bool(torch._dynamo.utils.counters["stats"]["unique_graphs"]) == compiled
        found += losses(trainer.state.log_history)
    assert found[1] == pytest.approx(found[0], rel=1e-4)


class Asking(Trainer):
    """Holds what `num_items_in_batch` was."""

    asked: int

    def get_batch_samples(self, *args):
        batches, self.asked = super().get_batch_samples(*args)
        self.batches = batches
        return batches, self.asked


@pytest.mark.parametrize("ignored", [255, -100])
def test_num_items_in_batch_counts_labels_other_than_minus_100(tmp_path, ignored):
    """With 255 it is not the number of pixels that count."""
    loss = gpl_fast.SegmentationLoss(example.CLASSES, ignore_index=ignored)
    trainer = Asking(
        example.segformer(8),
        TrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, max_steps=1, use_cpu=True,
            report_to="none", disable_tqdm=True,
        ),
        train_dataset=example.Squares(ignored=ignored),
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: loss(
            outputs.logits, labels
        ),
    )  # fmt: skip
    trainer.train()
    counted = sum(int(loss.count(batch["labels"])[0]) for batch in trainer.batches)
    assert (int(trainer.asked) == counted) == (ignored == -100)


def test_a_compute_loss_func_that_takes_means_is_not_divided_by_the_accumulation_steps(tmp_path):
    """The Trainer takes its value for one that `num_items_in_batch` has divided already."""

    def first(accumulate: int) -> float:
        torch.manual_seed(0)
        loss = gpl_fast.SegmentationLoss(example.CLASSES)
        trainer = Trainer(
            example.segformer(8),
            TrainingArguments(
                str(tmp_path), per_device_train_batch_size=16 // accumulate, max_steps=1,
                gradient_accumulation_steps=accumulate, logging_steps=1, use_cpu=True,
                report_to="none", disable_tqdm=True,
            ),
            train_dataset=example.Squares(),
            compute_loss_func=lambda outputs, labels, num_items_in_batch=None: loss(
                outputs.logits, labels
            ),
        )  # fmt: skip
        trainer.train()
        return losses(trainer.state.log_history)[0]

    assert first(4) == pytest.approx(4 * first(1), rel=0.05)


def test_autocast_is_off_at_the_loss(tmp_path):
    """The model's outputs are float32 again; `compute_dtype` brings the network to bfloat16."""
    seen = []

    class Looking(gpl_fast.SegmentationLoss):
        def forward(self, logits, labels, **words):
            used = self.explain(logits, labels).compute_dtype
            seen.append((torch.is_autocast_enabled("cpu"), logits.dtype, str(used)))
            return super().forward(logits, labels, **words)

    for dtype in (None, torch.bfloat16):
        trainer = SegmentationTrainer(
            example.segformer(8),
            TrainingArguments(
                str(tmp_path), max_steps=1, bf16=True, use_cpu=True, report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=example.Squares(8),
            loss=Looking(example.CLASSES, compute_dtype=dtype),
        )  # fmt: skip
        trainer.train()
    assert [row[:2] for row in seen] == [(False, torch.float32)] * 2
    assert [row[2].removeprefix("torch.") for row in seen] == ["float32", "bfloat16"]


def test_a_loss_that_is_no_number_and_a_batch_without_labels_are_refused(tmp_path):
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    for words in ({"return_parts": True}, {"reduction": "none"}):
        with pytest.raises(ValueError, match="one number"):
            SegmentationTrainer(
                example.segformer(8), arguments, loss=gpl_fast.SegmentationLoss(3, **words)
            )
    data = [{"pixel_values": torch.randn(3, 64, 64)}] * 8
    trainer = SegmentationTrainer(
        example.segformer(8), arguments, train_dataset=data, loss=gpl_fast.SegmentationLoss(3)
    )
    with pytest.raises(ValueError, match="expected 'labels'"):
        trainer.train()
