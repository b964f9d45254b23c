"""The loss in an mmsegmentation model, as a decode head's `loss_decode`, trained by MMEngine.

Run: ``python examples/mmseg_head.py``; some seconds on a CPU. The model's configuration is
mmseg_head_config.py.
"""

import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch.utils.data import Dataset

CONFIG = Path(__file__).with_name("mmseg_head_config.py")


class Squares(Dataset):
    """Images (3, 64, 64), 0 to 255, of a bright square; labels 0, 1, and 255 at the margin."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        rng = torch.Generator().manual_seed(index)
        y, x = torch.randint(4, 36, (2,), generator=rng).tolist()
        labels = torch.zeros(1, 64, 64, dtype=torch.long)
        labels[:, y : y + 20, x : x + 20] = 1
        image = 100 + 80 * labels + 30 * torch.randn(3, 64, 64, generator=rng)
        labels[:, :3] = 255
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo({"img_shape": (64, 64), "ori_shape": (64, 64)})
        return {"inputs": image, "data_samples": sample}


def main(folder: str, **head: object) -> Runner:
    """Train for an epoch; `head` replaces words of the decode head."""
    config = Config.fromfile(CONFIG)
    config.model.decode_head.update(head)
    runner = Runner(
        config.model,
        work_dir=folder,
        train_dataloader={
            "dataset": Squares(), "batch_size": 4,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "pseudo_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 3},
        optim_wrapper={"optimizer": {"type": "AdamW", "lr": 1e-2}},
        default_hooks={"logger": {"type": "LoggerHook", "interval": 1}},
        default_scope=config.default_scope,
        randomness={"seed": 0},
        log_level="WARNING",
    )  # fmt: skip
    runner.train()
    history = runner.message_hub.get_scalar("train/decode.loss_gpl")
    print(f"loss_gpl {history.data[0][0]:.3f} to {history.current():.3f}")
    return runner


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(made)
