"""The data: real handwritten digits on real photographs, each pixel with its class.

scikit-learn ships 1797 scans of digits (8 x 8, 17 grey levels) and two photographs. Training scenes
see the first 1297 scans and the left halves of the photographs, test scenes the last 500 scans and
the right halves. The scans are stored writer by writer, so a cut by position (not a shuffle) keeps
nearly all test writers unseen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

NUM_CLASSES = 11
BACKGROUND = 10
TRAIN_DIGITS = 1297
_TRIES = 12  # places tried for a digit before it is left out

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Sources:
    """What scenes are made of; ``index`` are positions in scikit-learn's list of scans."""

    index: NDArray[np.int64]  # (D,)
    classes: NDArray[np.int64]  # (D,), 0..9
    strokes: dict[int, Floats]  # height in pixels -> (D, height, width) in [0, 1]
    photos: list[Floats]  # (h, w, 3) in [0, 255], each photograph at three scales


@dataclass(frozen=True)
class Scenes:
    """A fixed set of scenes, as bytes to keep thousands of them small."""

    images: torch.Tensor  # (N, 3, S, S) uint8
    labels: torch.Tensor  # (N, S, S) uint8: 0..9, BACKGROUND

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, index: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B, 3, S, S) float32 about zero, channels last, and labels (B, S, S) int64."""
        images = self.images[index].to(device).float().sub_(110.0).div_(70.0)
        return images.contiguous(memory_format=torch.channels_last), self.labels[index].to(
            device, torch.int64
        )


def digit_heights(size: int) -> range:
    """Heights of digits, in pixels, for scenes of ``size`` x ``size``."""
    return range(max(10, size * 5 // 16), max(10, size // 2) + 1)


def load_sources(split: str, heights: range) -> Sources:
    """The digits and the halves of the photographs of one split, ``"train"`` or ``"test"``."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    from sklearn.datasets import load_digits, load_sample_images

    scans: Any = load_digits()
    order = np.arange(len(scans.images))
    index = order[:TRAIN_DIGITS] if split == "train" else order[TRAIN_DIGITS:]
    raw = torch.from_numpy(scans.images[index]).float().unsqueeze(1) / 16.0  # (D, 1, 8, 8)
    strokes = {
        h: F.interpolate(raw, size=(h, h), mode="bicubic", align_corners=False)
        .clamp(0.0, 1.0)[:, 0]
        .numpy()
        for h in heights
    }
    photos = []
    for photo in load_sample_images().images:  # two of (427, 640, 3) uint8
        half = photo.shape[1] // 2
        side = photo[:, :half] if split == "train" else photo[:, half:]
        chw = torch.from_numpy(side.copy()).permute(2, 0, 1).float().unsqueeze(0)
        for scale in (1, 2, 4):
            small = F.avg_pool2d(chw, scale) if scale > 1 else chw
            photos.append(small[0].permute(1, 2, 0).contiguous().numpy())
    return Sources(index, scans.target[index].astype(np.int64), strokes, photos)


def paste_digit(
    image: Floats, label: Bytes, stroke: Floats, digit: int, color: Floats, top: int, left: int
) -> None:
    """Blend one digit (h, w) in [0, 1] into image (S, S, 3) and mark its pixels in label (S, S)."""
    h, w = stroke.shape
    box = np.s_[top : top + h, left : left + w]
    # Steeper than the scan's own ramp: strokes cover their pixels, edges stay smooth.
    alpha = np.clip(2.0 * stroke - 0.3, 0.0, 1.0)[..., None]
    image[box] = image[box] * (1.0 - alpha) + color * alpha
    label[box][alpha[..., 0] > 0.5] = digit


def render(sources: Sources, count: int, size: int, seed: int) -> Scenes:
    """``count`` scenes of ``size`` x ``size``, the same for the same seed.

    Up to four digits a scene, bright on a darkened crop; boxes do not overlap, so that every digit
    that is there can be read, and one that finds no free place is left out.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.full((count, size, size), BACKGROUND, np.uint8)
    heights = np.array(sorted(sources.strokes))
    for image, label in zip(images, labels, strict=True):
        photo = sources.photos[rng.integers(len(sources.photos))]
        top = rng.integers(photo.shape[0] - size + 1)
        left = rng.integers(photo.shape[1] - size + 1)
        canvas = photo[top : top + size, left : left + size] * rng.uniform(0.35, 0.7)
        taken: list[tuple[int, int, int]] = []
        for _ in range(rng.integers(2, 5)):
            height, which = int(rng.choice(heights)), int(rng.integers(len(sources.index)))
            color = rng.uniform(170.0, 255.0, 3).astype(np.float32)
            for y, x in rng.integers(0, size - height + 1, (_TRIES, 2)).tolist():
                if all(
                    y + height <= t or t + h <= y or x + height <= s or s + h <= x
                    for t, s, h in taken
                ):
                    taken.append((y, x, height))
                    stroke, digit = sources.strokes[height][which], int(sources.classes[which])
                    paste_digit(canvas, label, stroke, digit, color, y, x)
                    break
        image[:] = canvas
    chw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Scenes(chw, torch.from_numpy(labels))
