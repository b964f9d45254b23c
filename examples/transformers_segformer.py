"""The loss in Hugging Face's Trainer: SegFormer, whose logits are smaller than the labels, with a
teacher of another size and gradient accumulation.

Run: ``python examples/transformers_segformer.py [BATCH [ACCUMULATE]]``, by torchrun too; some
seconds on a CPU. The models are small and random; yours come of ``from_pretrained``.
"""

import sys
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import SegformerConfig, SegformerForSemanticSegmentation, TrainingArguments

import gpl_fast
from gpl_fast.integrations.transformers import SegmentationTrainer

CLASSES, SIZE = 3, 64


def segformer(width: int) -> SegformerForSemanticSegmentation:
    """(N, 3, H, W) to logits (N, CLASSES, H / 4, W / 4)."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[width, 2 * width],
            num_attention_heads=[1, 2], sr_ratios=[4, 2], patch_sizes=[7, 3], strides=[4, 2],
            mlp_ratios=[2, 2], decoder_hidden_size=2 * width, num_labels=CLASSES,
            classifier_dropout_prob=0.0, drop_path_rate=0.0,  # each process draws its own
        )
    )  # fmt: skip


class Squares(Dataset):
    """Noisy squares (1) and bars (2); rows at the top, other for each image, are ignored."""

    def __init__(self, images: int = 16, ignored: int = 255) -> None:
        self.images, self.ignored = images, ignored

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rng = torch.Generator().manual_seed(index)
        y, x = torch.randint(8, SIZE - 24, (2,), generator=rng).tolist()
        labels = torch.zeros(SIZE, SIZE, dtype=torch.long)
        labels[y : y + 20, x : x + 20] = 1
        labels[:, 4:9] = 2
        image = labels[None] + 0.3 * torch.randn(3, SIZE, SIZE, generator=rng)
        labels[: 12 * index % SIZE] = self.ignored
        return {"pixel_values": image, "labels": labels}


class SegformerWithLoss(SegformerForSemanticSegmentation):
    """A model that owns its loss: nothing of it is in the file that `save_pretrained` writes."""

    def __init__(self, config: SegformerConfig) -> None:
        super().__init__(config)
        self.criterion = gpl_fast.SegmentationLoss(config.num_labels)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **words):
        outputs = super().forward(pixel_values, **words)
        if labels is not None:
            outputs.loss = self.criterion(outputs.logits, labels)
        return outputs


def main(folder: str, batch_size: int = 2, accumulate: int = 4, **words: object) -> list[dict]:
    """Train for three epochs; what the Trainer has logged of each step."""
    torch.manual_seed(0)
    trainer = SegmentationTrainer(
        segformer(16),
        TrainingArguments(
            folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulate,
            per_device_eval_batch_size=2,
            **{"num_train_epochs": 3, "learning_rate": 3e-3, "logging_steps": 1, "use_cpu": True,
               "report_to": "none", "disable_tqdm": True, "optim": "sgd", **words},
        ),
        train_dataset=Squares(),
        eval_dataset=Squares(4),
        # Under bf16=True autocast ends before the loss: its network's dtype is said here.
        loss=gpl_fast.SegmentationLoss(CLASSES, compute_dtype=torch.bfloat16),
        teacher=segformer(24),
    )  # fmt: skip
    trainer.train()
    return [*trainer.state.log_history, trainer.evaluate()]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        rows = main(made, *map(int, sys.argv[1:]), optim="adamw_torch")
    logged = [row["loss"] for row in rows if "loss" in row]
    print(f"loss {logged[0]:.4f} to {logged[-1]:.4f}, evaluation {rows[-1]['eval_loss']:.4f}")
