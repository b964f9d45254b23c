"""Depth with Hugging Face's DPT: L1 and the perceptual loss, on targets with holes.

Run: ``python examples/transformers_depth.py``; some seconds on a CPU. The model is small and
random; yours comes of ``from_pretrained``.
"""

import torch
from torch import Tensor
from transformers import DPTConfig, DPTForDepthEstimation

import gpl_fast

SIZE = 64


def small_dpt() -> DPTForDepthEstimation:
    """(N, 3, H, W) to ``predicted_depth`` (N, H, W)."""
    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64,
            image_size=SIZE, patch_size=16, backbone_out_indices=[0, 1, 2, 3], is_hybrid=False,
            neck_hidden_sizes=[16, 16, 32, 32], fusion_hidden_size=16,
        )
    )  # fmt: skip


def scenes(images: int = 4) -> tuple[Tensor, Tensor]:
    """Images (N, 3, H, W) and depth (N, H, W) in metres, NaN where nothing was measured."""
    rng = torch.Generator().manual_seed(1)
    depth = torch.linspace(4, 2, SIZE)[:, None].expand(images, SIZE, SIZE).clone()
    for each in depth:
        y, x = torch.randint(4, SIZE - 28, (2,), generator=rng).tolist()
        each[y : y + 24, x : x + 24] = 1.5
    image = (1 / depth)[:, None] + 0.05 * torch.randn(images, 3, SIZE, SIZE, generator=rng)
    depth[torch.rand(depth.shape, generator=rng) < 0.2] = torch.nan
    return image, depth


def depth_loss(predicted: Tensor, depth: Tensor, perceptual: gpl_fast.GenericPerceptualLoss):
    """L1 and the perceptual loss over the pixels that were measured; both maps (N, H, W).

    The perceptual one goes with the square of the depth's unit, so its weight does too.
    """
    measured = depth.isfinite()
    l1 = (predicted - depth)[measured].abs().mean()
    return l1 + 0.02 * perceptual(predicted.unsqueeze(1), depth.unsqueeze(1), mask=measured)


def main(steps: int = 30) -> list[float]:
    """Values of all steps."""
    torch.manual_seed(0)
    model = small_dpt()
    perceptual = gpl_fast.GenericPerceptualLoss(1, activation="none")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    images, depth = scenes()
    values = []
    for _ in range(steps):
        value = depth_loss(model(images).predicted_depth, depth, perceptual)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    print(f"loss {values[0]:.3f} to {values[-1]:.3f}")
    return values


if __name__ == "__main__":
    main()
