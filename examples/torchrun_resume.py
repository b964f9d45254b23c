"""The loss with plain DDP: counts over processes, a checkpoint, and a run that goes on as if it had
not been interrupted.

Run: ``torchrun --nproc-per-node 2 examples/torchrun_resume.py --checkpoint last.pt --steps 5``, and
again with ``--steps 10``; some seconds on a CPU.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gpl_fast

CLASSES, SIZE, IMAGES = 3, 32, 8


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Of all processes: noisy squares (1); rows at the top, other for each image, are ignored."""
    rng = torch.Generator().manual_seed(step)
    labels = torch.zeros(IMAGES, SIZE, SIZE, dtype=torch.long)
    for i, label in enumerate(labels):
        y, x = torch.randint(4, SIZE - 12, (2,), generator=rng).tolist()
        label[y : y + 10, x : x + 10] = 1
        label[: 4 * i] = 255
    noise = 0.3 * torch.randn(IMAGES, 3, SIZE, SIZE, generator=rng)
    return labels.clamp(max=1)[:, None] + noise, labels


def main(arguments: list[str] | None = None) -> tuple[float, float]:
    """The last step's value, over all processes, and the norm of the model's parameters."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path)
    args = parser.parse_args(arguments)
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, CLASSES, 3, padding=1))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    # No state of its own: it is neither in the checkpoint nor broadcast.
    loss = gpl_fast.SegmentationLoss(CLASSES)
    first = 0
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    value = torch.zeros(())
    for step in range(first, args.steps):
        images, labels = (t[rank::ranks] for t in batch(step))
        counts = loss.count(labels)
        dist.all_reduce(counts)
        # DDP averages gradients: divided by a mean of counts they are those of the whole batch.
        value = loss(model(images), labels, normalizer=counts / ranks)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    if args.checkpoint and rank == 0:
        state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": args.steps}, args.checkpoint)
    value = value.detach() / ranks
    dist.all_reduce(value)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    print(f"loss {value.item():.7f}, model {norm:.7f}", flush=True)
    dist.destroy_process_group()
    return value.item(), norm


if __name__ == "__main__":
    main()
