"""The loss with accelerate: gradient accumulation whose gradient is the large batch's, and mixed
precision.

Run: ``python examples/accelerate_segmentation.py``, or ``accelerate launch`` it; some seconds on a
CPU.
"""

import itertools
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gpl_fast

CLASSES, SIZE = 3, 32


def scenes(images: int = 16) -> TensorDataset:
    """Noisy squares (1); rows at the top, other for each image, are ignored."""
    rng = torch.Generator().manual_seed(1)
    labels = torch.zeros(images, SIZE, SIZE, dtype=torch.long)
    for i, label in enumerate(labels):
        y, x = torch.randint(4, SIZE - 12, (2,), generator=rng).tolist()
        label[y : y + 10, x : x + 10] = 1
        label[: 6 * i % SIZE] = 255
    noise = 0.3 * torch.randn(images, 3, SIZE, SIZE, generator=rng)
    return TensorDataset(labels.clamp(max=1)[:, None] + noise, labels)


def main(pieces: int = 4, batch_size: int = 2, epochs: int = 6, **words: object) -> list[float]:
    """Values of all steps; each is of `pieces` batches in every process."""
    # With gradient_accumulation_steps it would divide by them, a mean of means.
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), **words)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, CLASSES, 5, padding=2)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    model, optimizer, data = accelerator.prepare(model, optimizer, DataLoader(scenes(), batch_size))
    loss = gpl_fast.SegmentationLoss(CLASSES)
    values = []
    for _ in range(epochs):
        batches = iter(data)
        while held := list(itertools.islice(batches, pieces)):
            counts = sum(loss.count(labels) for _, labels in held)
            counts = accelerator.reduce(counts, "mean")  # DDP averages gradients
            total = 0.0
            for i, (images, labels) in enumerate(held):
                last = i == len(held) - 1
                with nullcontext() if last else accelerator.no_sync(model):
                    with accelerator.autocast():  # else only the model's forward is under it
                        value = loss(model(images), labels, normalizer=counts)
                    accelerator.backward(value)
                total += value.item()
            optimizer.step()
            optimizer.zero_grad()
            values.append(total)
    parameters = nn.utils.parameters_to_vector(model.parameters())
    print(f"loss {values[0]:.6f} to {values[-1]:.6f}, model {parameters.norm():.7f}")
    return values


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
