"""Scenes with hundreds of classes: textured regions and handwritten digits, each of several hues.

A class is a composition, so that a net confuses a class with few others (the next hue, a similar
texture or digit), as nets confuse those of ADE20K or LVIS. Every pixel has a class. Classes are
long-tailed, and each scene draws most of its classes from one of a few themes.
"""

from __future__ import annotations

from colorsys import hsv_to_rgb
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gpl_fast.demo.scenes import Scenes, load_sources

DIGITS = 10
TEXTURES = 10  # flat, chequered, four directions of coarse and of fine stripes
THEMES = 6
HEIGHTS = range(20, 57, 6)  # of the digits, pixels

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Composition:
    """``hues * TEXTURES`` classes of regions, then ``DIGITS * hues * fills`` of digits."""

    hues: int
    fills: int  # the first textures, inside the digits

    @property
    def regions(self) -> int:
        return self.hues * TEXTURES

    @property
    def classes(self) -> int:
        return self.regions + DIGITS * self.hues * self.fills


def texture(kind: int, size: int, rng: np.random.Generator) -> Floats:
    """Grey values (S, S) about 1; kind < TEXTURES."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    depth, phase = rng.uniform(0.3, 0.5), rng.uniform(0, 2 * np.pi)
    if kind == 0:
        return np.ones((size, size), np.float32)
    if kind == 1:
        return 1 + depth * np.sign(np.sin(y * 0.8 + phase) * np.sin(x * 0.8 + phase))
    angle = (kind - 2) % 4 * np.pi / 4 + rng.normal(0, 0.1)
    rate = 0.6 if kind < 6 else 1.4
    wave: Floats = np.sin(rate * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    return 1 + depth * wave


def surface(hue: int, kind: int, hues: int, size: int, rng: np.random.Generator) -> Floats:
    """(S, S, 3) in about [0, 255]; the hue strays by a fifth of the distance to the next one."""
    color = hsv_to_rgb((hue + rng.normal(0, 0.2)) / hues % 1, rng.uniform(0.5, 0.9), 1.0)
    plain = rng.uniform(90, 220) * np.array(color, np.float32)
    return plain * texture(kind, size, rng)[..., None]


def render(made: Composition, split: str, count: int, size: int, seed: int) -> Scenes:
    """``count`` scenes of ``size`` x ``size``, labels int16; the digits are those of ``split``."""
    rng = np.random.default_rng(seed)
    sources = load_sources(split, HEIGHTS)
    fixed = np.random.default_rng(0)  # which class is frequent, and in which theme: of no split
    names = fixed.permutation(made.classes)  # class number of a composition: in no useful order
    weight = np.empty(made.classes)
    weight[: made.regions] = 1 / (5 + fixed.permutation(made.regions))
    weight[made.regions :] = 1 / (5 + fixed.permutation(made.classes - made.regions))
    theme = fixed.integers(THEMES, size=made.classes)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    images = np.empty((count, size, size, 3), np.uint8)
    labels = np.empty((count, size, size), np.int16)
    for image, label in zip(images, labels, strict=True):
        chance = weight * np.where(theme == rng.integers(THEMES), 8.0, 1.0)
        drawn = _draw(chance, 0, made.regions, int(rng.integers(3, 7)), rng)
        centres = rng.uniform(0, size, (len(drawn), 2, 1, 1))
        wave = 4 * np.sin(y / 9 + rng.uniform(0, 6)) + 4 * np.sin(x / 7 + rng.uniform(0, 6))
        cell = np.argmin([np.hypot(y + wave - b, x - wave - a) for b, a in centres], axis=0)
        canvas = np.empty((size, size, 3), np.float32)
        for i, region in enumerate(drawn):
            paint = surface(region // TEXTURES, region % TEXTURES, made.hues, size, rng)
            canvas[cell == i], label[cell == i] = paint[cell == i], names[region]
        for thing in _draw(chance, made.regions, made.classes, int(rng.integers(2, 6)), rng):
            digit, rest = divmod(thing - made.regions, made.hues * made.fills)
            height = int(rng.choice(HEIGHTS))
            which = rng.choice(np.flatnonzero(sources.classes == digit))
            top, left = rng.integers(0, size - height + 1, 2)
            box = np.s_[top : top + height, left : left + height]
            ink = np.clip(2 * sources.strokes[height][which] - 0.3, 0, 1)[..., None]
            paint = surface(rest // made.fills, rest % made.fills, made.hues, height, rng)
            canvas[box] = canvas[box] * (1 - ink) + paint * ink
            label[box][ink[..., 0] > 0.5] = names[thing]
        light = 1 + rng.uniform(-0.25, 0.25) * (x / size - 0.5) + rng.uniform(-0.1, 0.1)
        canvas = canvas * light[..., None] + rng.normal(0, 5, canvas.shape)
        image[:] = np.clip(canvas, 0, 255)
    chw = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return Scenes(chw, torch.from_numpy(labels))


def _draw(
    chance: NDArray[np.float64], start: int, stop: int, count: int, rng: np.random.Generator
) -> list[int]:
    """``count`` different compositions out of [start, stop)."""
    p = chance[start:stop] / chance[start:stop].sum()
    return [start + int(i) for i in rng.choice(stop - start, count, replace=False, p=p)]
