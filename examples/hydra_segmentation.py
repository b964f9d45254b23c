"""The loss made by Hydra from YAML, and overridden on the command line.

Run: ``python examples/hydra_segmentation.py loss.gpl_weight=0.3``; some seconds on a CPU.
"""

import hydra
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn


def train(config: DictConfig) -> list[float]:
    """Values of all steps of a small network on noise with a bright square."""
    torch.manual_seed(config.seed)
    loss = hydra.utils.instantiate(config.loss)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, config.loss.num_classes, 1)
    )
    optimizer = hydra.utils.instantiate(config.optimizer, params=model.parameters())
    labels = torch.zeros(2, 64, 64, dtype=torch.long)
    labels[:, 20:40, 10:50] = 1
    images = labels[:, None] + 0.3 * torch.randn(2, 3, 64, 64)
    values = []
    for _ in range(config.steps):
        value = loss(model(images), labels)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


@hydra.main(version_base=None, config_path=".", config_name="hydra_segmentation")
def main(config: DictConfig) -> None:
    """Print the configuration and the first and last value."""
    print(OmegaConf.to_yaml(config.loss), end="")
    values = train(config)
    print(f"loss {values[0]:.4f} to {values[-1]:.4f}")


if __name__ == "__main__":
    main()
