"""The loss with FSDP2: inside and outside of what is sharded, bfloat16, logits that are DTensors.

Run: ``torchrun --nproc-per-node 2 examples/fsdp2_segmentation.py``; some seconds on a CPU.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import gpl_fast

CLASSES, SIZE = 3, 32


class Model(nn.Module):
    """Logits, or with labels the loss, which it owns."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, CLASSES, 5, padding=2)
        )
        self.loss = gpl_fast.SegmentationLoss(CLASSES)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.net(images)
        return logits if labels is None else self.loss(logits, labels)


def train(inside: bool, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """Values of ten steps on this process' images, with the loss inside or outside of the model."""
    torch.manual_seed(0)
    model = Model().to(device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(model.net[0], mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    rng = torch.Generator().manual_seed(dist.get_rank())
    labels = torch.zeros(4, SIZE, SIZE, dtype=torch.long)
    labels[:, 8:20, 4 : 12 + 4 * dist.get_rank()] = 1
    images = labels[:, None] + 0.3 * torch.randn(4, 3, SIZE, SIZE, generator=rng)
    images, labels, values = images.to(device), labels.to(device), []
    for _ in range(10):
        value = model(images, labels) if inside else model.loss(model(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


def of_dtensors(device: torch.device) -> tuple[float, float]:
    """The loss of logits that are sharded by images, and of this process' own rows."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, CLASSES, SIZE, SIZE, generator=rng).to(device)
    labels = torch.randint(0, CLASSES, (4, SIZE, SIZE), generator=rng).to(device)
    sharded = [distribute_tensor(t, mesh, [Shard(0)]) for t in (logits, labels)]
    loss = gpl_fast.SegmentationLoss(CLASSES)
    # What to_local() gives: the value is of this process' images.
    return loss(*sharded).item(), loss(*(t.to_local() for t in sharded)).item()


def main() -> None:
    """Print the values of this process."""
    dist.init_process_group()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", dist.get_rank()) if cuda else torch.device("cpu")
    for inside in (False, True):
        values = train(inside, device)
        print(f"inside {inside}: loss {values[0]:.6f} to {values[-1]:.6f}", flush=True)
    print("DTensor {:.6f}, local {:.6f}".format(*of_dtensors(device)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
