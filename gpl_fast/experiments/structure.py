"""The task of the paper's ablations: shapes cut out of photographs, under noise.

A scene is a crop of a photograph with two to four objects. An object is filled with a crop of
another photograph, a little brighter: texture says nothing, brightness hints at "some object", and
which of the four classes it is, its outline alone says. Contrasts of the photographs and noise hide
the brightness of a pixel, so that who is right must look at the whole object.

Photographs are those that scikit-image and scikit-learn bring along; training scenes see their
left halves, test scenes the right ones. Scenes are 64 x 64: `NET`, with four pools, ends at 4 x 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from gpl_fast.demo.scenes import Bytes, Floats, Scenes
from gpl_fast.demo.train import mean_iou

CLASSES = ("background", "disc", "square", "triangle", "ring")
NUM_CLASSES = len(CLASSES)
NET = "1,1,1,1"
SIZE = 64

_PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "grass", "gravel")
_TRIES = 20  # places tried for an object before it is left out
_GAP = 2.0  # pixels between two objects, at least

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Task:
    """What decides how hard the scenes are; grey levels of 0 to 255, sizes in pixels."""

    size: int = SIZE
    objects: tuple[int, int] = (2, 4)  # fewest, most
    radius: tuple[float, float] = (9.0, 15.0)
    texture: float = 0.5  # contrast of the photographs
    contrast: float = 35.0  # how much brighter an object is
    noise: float = 30.0  # standard deviation at every pixel and colour


@dataclass(frozen=True)
class StructureScenes(Scenes):
    """Scenes that know their objects."""

    objects: Tensor  # (N, S, S) uint8: 0 = background, 1, 2, ... = the scene's objects


def load_photos(split: str) -> list[Floats]:
    """Halves of the photographs, (h, w, 3) in [0, 255], for `split` "train" or "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}; expected 'train' or 'test'")
    from skimage import data
    from sklearn.datasets import load_sample_images

    photos: list[Any] = [getattr(data, name)() for name in _PHOTOS]
    photos += load_sample_images().images
    halves = []
    for photo in photos:
        rgb = np.broadcast_to(np.atleast_3d(photo), (*photo.shape[:2], 3)).astype(np.float32)
        middle = rgb.shape[1] // 2
        half = rgb[:, :middle] if split == "train" else rgb[:, middle:]
        chw = torch.from_numpy(half.copy()).permute(2, 0, 1).unsqueeze(0)
        halves.append(F.avg_pool2d(chw, 2)[0].permute(1, 2, 0).contiguous().numpy())
    return halves


def outline(kind: int, radius: float, angle: float, dy: Floats, dx: Floats) -> Mask:
    """Pixels at (dy, dx) from the centre that belong to a shape of class `kind`.

    All classes have about the same area at the same radius, so that size says nothing.
    """
    v = math.cos(angle) * dy - math.sin(angle) * dx
    u = math.sin(angle) * dy + math.cos(angle) * dx
    square_of_r = dy**2 + dx**2
    inside: Mask
    if CLASSES[kind] == "disc":
        inside = square_of_r < (0.9 * radius) ** 2
    elif CLASSES[kind] == "square":
        inside = (np.abs(v) < 0.8 * radius) & (np.abs(u) < 0.8 * radius)
    elif CLASSES[kind] == "triangle":
        inside = (v > -0.65 * radius) & (np.abs(u) < (1.3 * radius - v) / math.sqrt(3))
    else:
        inside = (square_of_r < (1.05 * radius) ** 2) & (square_of_r > (0.5 * radius) ** 2)
    return inside


def render(
    photos: list[Floats], count: int, seed: int, task: Task | None = None
) -> StructureScenes:
    """`count` scenes, the same for the same seed."""
    t = task or Task()
    rng = np.random.default_rng(seed)
    shape = (count, t.size, t.size)
    images = np.empty((*shape, 3), np.uint8)
    labels, objects = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    for image, label, which in zip(images, labels, objects, strict=True):
        canvas = _crop(photos, t, rng)
        _place(canvas, label, which, photos, t, rng)
        noisy = canvas + rng.normal(0.0, t.noise, canvas.shape)
        image[:] = np.clip(noisy, 0.0, 255.0)
    chw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return StructureScenes(chw, torch.from_numpy(labels), torch.from_numpy(objects))


def _crop(photos: list[Floats], t: Task, rng: np.random.Generator) -> Floats:
    """A crop (S, S, 3) of any photograph, of mean 100: brightness tells no photograph."""
    photo = photos[rng.integers(len(photos))]
    top, left = (int(rng.integers(n - t.size + 1)) for n in photo.shape[:2])
    crop = photo[top : top + t.size, left : left + t.size]
    even: Floats = 100.0 + t.texture * (crop - crop.mean())
    return even


def _place(
    canvas: Floats,
    label: Bytes,
    which: Bytes,
    photos: list[Floats],
    t: Task,
    rng: np.random.Generator,
) -> None:
    """Objects into canvas (S, S, 3), their classes and numbers into label and which (S, S)."""
    y, x = np.mgrid[: t.size, : t.size].astype(np.float32)
    taken: list[tuple[float, float, float]] = []
    for _ in range(rng.integers(t.objects[0], t.objects[1] + 1)):
        kind, angle = int(rng.integers(1, NUM_CLASSES)), float(rng.uniform(0.0, 2.0 * math.pi))
        radius = float(rng.uniform(*t.radius))
        for cy, cx in rng.uniform(0.8 * radius, t.size - 0.8 * radius, (_TRIES, 2)).tolist():
            if all(math.hypot(cy - a, cx - b) > 1.2 * (radius + r) + _GAP for a, b, r in taken):
                taken.append((cy, cx, radius))
                inside = outline(kind, radius, angle, y - cy, x - cx)
                canvas[inside] = _crop(photos, t, rng)[inside] + t.contrast
                label[inside], which[inside] = kind, len(taken)
                break


@dataclass(frozen=True)
class Scores:
    """How good predictions are; for each pixel, each outline and each object."""

    miou: float  # over the classes, from one confusion matrix
    boundary: float  # F1 of the classes' outlines, a pixel beside counts as met
    panoptic: float  # panoptic quality: each connected region of a class counts as one object
    fragments: float  # such regions for each true object: 1 where there are as many


def score(predicted: Tensor, scenes: StructureScenes) -> Scores:
    """The scores of classes (N, S, S) predicted for all of the scenes."""
    truth, guess = scenes.labels.long(), predicted.cpu().long()
    cells = torch.bincount((truth * NUM_CLASSES + guess).flatten(), minlength=NUM_CLASSES**2)
    quality, regions = _panoptic(guess.numpy(), scenes)
    return Scores(
        miou=mean_iou(cells.view(NUM_CLASSES, NUM_CLASSES)),
        boundary=_boundary_f(guess, truth),
        panoptic=quality,
        fragments=regions,
    )


def _boundary_f(guess: Tensor, truth: Tensor) -> float:
    """F1 over all pixels of the outlines of all classes but the background."""
    a, b = (_outlines(x) for x in (guess, truth))
    met_a, met_b = (x * F.max_pool2d(y, 3, 1, 1) for x, y in ((a, b), (b, a)))
    precision, recall = (
        float(m.sum()) / max(float(x.sum()), 1.0) for m, x in ((met_a, a), (met_b, b))
    )
    return 2.0 * precision * recall / max(precision + recall, 1e-12)


def _outlines(labels: Tensor) -> Tensor:
    """(N, C - 1, S, S) float: 1 where a pixel of a class has a neighbour that is not of it."""
    of_class = F.one_hot(labels, NUM_CLASSES)[..., 1:].movedim(3, 1).float()
    return of_class * F.max_pool2d(1.0 - of_class, 3, 1, 1)


def _panoptic(guess: NDArray[np.int64], scenes: StructureScenes) -> tuple[float, float]:
    """Panoptic quality, and regions for each object, over all scenes and classes.

    The quality is Σ IoU / (met + missed / 2 + made up / 2), so the divisor is half of all there is.
    """
    from skimage import measure

    connected: Any = measure.label

    overlap, regions, there = 0.0, 0, 0
    for g, label, which in zip(guess, scenes.labels.numpy(), scenes.objects.numpy(), strict=True):
        for kind in range(1, NUM_CLASSES):
            # Regions hold together at corners too.
            parts, n = connected(g == kind, connectivity=2, return_num=True)
            own = np.where(label == kind, which, 0)
            m = int(which.max()) + 1
            both = np.bincount((parts * m + own).ravel(), minlength=(n + 1) * m).reshape(-1, m)
            union = both.sum(1, keepdims=True) + both.sum(0, keepdims=True) - both
            iou = both[1:, 1:] / np.maximum(union[1:, 1:], 1)
            overlap += float(iou[iou > 0.5].sum())  # at most one region meets an object, and back
            regions, there = regions + n, there + int((both[:, 1:].sum(0) > 0).sum())
    return overlap / max((regions + there) / 2, 1), regions / max(there, 1)
