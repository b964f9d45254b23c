"""Hugging Face: a `transformers.Trainer` whose loss is `gpl_fast.SegmentationLoss`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gpl_fast.segmentation import SegmentationLoss


class SegmentationTrainer(transformers.Trainer):
    """Trains a model whose output has `logits` (N, C, h, w) with labels (N, H, W).

    A step's gradient and the loss that is logged are those of the whole batch, over accumulation
    steps and processes: the loss counts; `num_items_in_batch` is of labels other than -100.

    Args:
        loss: set `compute_dtype` there, autocast ends with the model's forward.
        teacher: called like the model, without labels; its logits are the target.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self, *args: Any, loss: SegmentationLoss, teacher: nn.Module | None = None, **words: Any
    ) -> None:
        super().__init__(*args, **words)
        if loss.return_parts or loss.gpl.options.reduction != "mean":
            raise ValueError("loss: expected one number, return_parts=False and reduction='mean'")
        self.loss, self.teacher = loss, teacher and teacher.eval().to(self.args.device)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The batches of one step, and (2,) of what counts, pixels and images."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.loss.count(b["labels"].to(device)) for b in batches if "labels" in b]
        # Their mean over processes, as DDP averages gradients.
        return batches, self.accelerator.reduce(sum(counts), "mean") if counts else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Of one piece; in evaluation its mean: the count there is the Trainer's own."""
        if "labels" not in inputs:
            raise ValueError(f"batch: got {sorted(inputs)}, expected 'labels' in it")
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs, target = model(**given), None
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(**given).logits
        counts = num_items_in_batch if model.training else None
        value = self.loss(outputs.logits, inputs["labels"], teacher=target, normalizer=counts)
        return (value, outputs) if return_outputs else value
