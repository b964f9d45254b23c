"""The loss in a LightningModule: parts logged, a teacher outside the checkpoint, gradient
accumulation that equals the large batch, bf16-mixed, DDP, a YAML configuration.

Run: ``python lightning_segmentation.py fit --config lightning_segmentation.yaml``; some seconds on
a CPU.
"""

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gpl_fast

CLASSES, SIZE = 3, 32


def small_network(width: int) -> nn.Module:
    """Images (N, 3, H, W) to logits (N, CLASSES, H, W)."""
    return nn.Sequential(
        nn.Conv2d(3, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, width, 5, padding=2),
        nn.ReLU(), nn.Conv2d(width, CLASSES, 1),
    )  # fmt: skip


class Scenes(L.LightningDataModule):
    """Noisy images of squares (1) and bars (2); a margin, other for each image, is ignored."""

    def __init__(self, images: int = 32, batch_size: int = 4) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        labels = torch.zeros(images, SIZE, SIZE, dtype=torch.long)
        for i, label in enumerate(labels):
            (y, x), margin = torch.randint(4, SIZE - 12, (2,), generator=rng).tolist(), 6 * i % SIZE
            label[y : y + 10, x : x + 10] = 1
            label[:, 2:5] = 2
            label[:margin] = 255
        colours = torch.tensor([[0.2, 0.3, 0.2], [0.6, 0.4, 0.3], [0.4, 0.4, 0.6]])
        clean = colours[labels.clamp(max=2)].permute(0, 3, 1, 2)
        noise = 0.2 * torch.randn(clean.shape, generator=rng)
        self.data, self.batch_size = TensorDataset(clean + noise, labels), batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, self.batch_size)

    val_dataloader = train_dataloader


class Segmenter(L.LightningModule):
    """A student, trained by `loss` with labels and a teacher."""

    def __init__(self, loss: gpl_fast.SegmentationLoss, width: int = 8, lr: float = 0.1) -> None:
        super().__init__()
        self.student, self.loss, self.lr = small_network(width), loss, lr
        # In a list, and so no submodule: neither trained, nor in the checkpoint, nor broadcast.
        self.teacher = [small_network(2 * width).eval().requires_grad_(False)]

    def on_fit_start(self) -> None:
        self.teacher[0].to(self.device)

    def parts(self, batch: tuple[Tensor, Tensor], **words: Tensor) -> dict[str, Tensor]:
        images, labels = batch
        with torch.no_grad():
            teacher = self.teacher[0](images)
        student = self.student(images)
        return self.loss(student, labels, teacher=teacher, return_parts=True, **words)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        parts = self.parts(batch)
        self.log_dict({f"train/{name}": part.detach() for name, part in parts.items()})
        return sum(parts.values())

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("val/loss", self.loss(self.student(images), labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), self.lr, momentum=0.9)


class Accumulating(Segmenter):
    """Steps over `pieces` batches whose gradient is that of one large batch, whatever each holds of
    ignored pixels; ``accumulate_grad_batches`` would take a mean of means."""

    def __init__(self, loss: gpl_fast.SegmentationLoss, pieces: int = 4, **words: float) -> None:
        super().__init__(loss, **words)
        self.automatic_optimization, self.pieces = False, pieces
        self.held: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.held.append(batch)
        if len(self.held) < self.pieces and not self.trainer.is_last_batch:
            return
        optimizer = self.optimizers()
        counts = sum(self.loss.count(labels) for _, labels in self.held)
        counts = self.trainer.strategy.reduce(counts, reduce_op="mean")  # DDP averages gradients
        optimizer.zero_grad()
        for held in self.held:
            self.manual_backward(sum(self.parts(held, normalizer=counts).values()))
        optimizer.step()
        self.held.clear()


def main(arguments: list[str] | None = None) -> Segmenter:
    """Do as the command line, or `arguments`, says; the trained module is returned."""
    cli = LightningCLI(
        Segmenter, Scenes, args=arguments, seed_everything_default=0, subclass_mode_model=True,
        save_config_callback=None,
    )  # fmt: skip
    found = dict(cli.trainer.callback_metrics)
    found["student"] = nn.utils.parameters_to_vector(cli.model.student.parameters()).norm()
    print(", ".join(f"{name} {value:.7f}" for name, value in found.items()))
    return cli.model


if __name__ == "__main__":
    main()
