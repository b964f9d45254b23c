"""Distillation with a stored teacher: the k largest classes of each pixel, one file an image.

With 150 classes and k = 8, values in half precision and byte indices take 24 bytes a pixel, float32
logits 600. The teacher runs once.

Run: ``python examples/stored_teachers.py [--steps 20]``.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gpl_fast

CLASSES, SIZE, IMAGES, K, T = 150, 32, 8, 8, 2.0
Sample = tuple[Tensor, Tensor, gpl_fast.TopK]


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 5, padding=2), nn.ReLU(), nn.Conv2d(width, CLASSES, 5, padding=2)
    )


def store(teacher: nn.Module, folder: Path) -> None:
    """Images, labels and the teacher's top k, with the temperature of the student's loss."""
    generator = torch.Generator().manual_seed(1)
    for i in range(IMAGES):
        image = torch.rand(1, 3, SIZE, SIZE, generator=generator)
        with torch.no_grad():
            logits = teacher(image)
        values, indices = (logits / T).softmax(dim=1).topk(K, dim=1)  # (1, k, S, S)
        tensors = {"image": image[0], "labels": logits.argmax(dim=1)[0].byte()}
        # Byte indices hold up to 256 classes.
        tensors |= {"values": values.half(), "indices": indices.byte()}
        save_file({k: x.contiguous() for k, x in tensors.items()}, folder / f"{i:04}.safetensors")


class Stored(Dataset[Sample]):
    """What `store` wrote."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Sample:
        x = load_file(self.files[index])
        top = gpl_fast.TopK(x["values"], x["indices"], rest="uniform")
        return x["image"], x["labels"].long(), top


def collate(samples: list[Sample]) -> Sample:
    images, labels, tops = zip(*samples, strict=True)
    return torch.stack(images), torch.stack(labels), gpl_fast.TopK.cat(tops)


def main(steps: int = 20, workers: int = 2) -> list[float]:
    """Train a student and return its losses."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student = network(16).to(device)
    loss = gpl_fast.SegmentationLoss(CLASSES, temperature=T)  # its cross-entropy has none
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses: list[float] = []
    with TemporaryDirectory() as folder:
        store(network(32), Path(folder))
        loader = DataLoader(
            Stored(Path(folder)), batch_size=4, shuffle=True, num_workers=workers,
            collate_fn=collate, pin_memory=device == "cuda", persistent_workers=workers > 0,
        )  # fmt: skip
        while len(losses) < steps:
            for images, labels, top in loader:
                images, labels, top = (x.to(device) for x in (images, labels, top))
                value = loss(student(images), labels, teacher=top)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                losses.append(value.item())
    print(f"{len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    main(**vars(parser.parse_args()))
