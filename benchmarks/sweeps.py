"""The cases of `run.py`: one shape, target and network each, grouped by what they vary."""

from __future__ import annotations

from dataclasses import dataclass, replace

from providers import BASELINE, LPIPS, NET, PROVIDERS

Shape = tuple[int, int, int, int]

COMPILED = tuple(name for name in PROVIDERS if name.startswith("compile"))
OURS = ("gpl_fast-fp32", "gpl_fast-bf16")
EAGER = ("eager-fp32", "eager-bf16", "eager-bf16-cl")
COMMON = (BASELINE, "eager-bf16-cl", *OURS)


@dataclass(frozen=True)
class Case:
    """What is measured together: logits of `shape`, a target of `kind`, some providers."""

    sweep: str
    shape: Shape
    kind: str = "labels"
    peaked: bool = True
    net: str = NET
    providers: tuple[str, ...] = (BASELINE, *OURS)
    floor: bool = False  # the convolutions alone and a pass over the logits are measured too

    def __str__(self) -> str:
        shape, peaked = "x".join(map(str, self.shape)), "peaked" if self.peaked else "flat"
        return f"{self.sweep}: {shape} {self.kind}, {peaked}, {self.net}"

    def on_few_pixels(self) -> Case:
        """A small one of its kind, nothing compiled."""
        n, c, h, w = self.shape
        sides = [8 * max(size.bit_length() - 4, 4) for size in (h, w)]  # 32: five poolings
        shape = (min(n, 2), c if self.net == LPIPS else c.bit_length(), sides[0], sides[1])
        providers = tuple(name for name in self.providers if name not in COMPILED)
        return replace(self, shape=shape, providers=providers)


LARGE, MIDDLE = (1, 1203, 512, 512), (1, 150, 256, 256)
SWEEPS: dict[str, list[Case]] = {
    "large": [
        Case("large", LARGE, "dense", providers=(BASELINE, "gpl_fast-bf16"), floor=True),
        Case("large", LARGE, "labels", floor=True),
    ],
    "classes": [
        Case("classes", (1, c, 192, 192), providers=COMMON, floor=True)
        for c in (1, 19, 150, 847, 1203)
    ],
    # Peaked logits of this shape are those of "providers".
    "flat": [Case("flat", MIDDLE, kind, peaked=False) for kind in ("labels", "dense")],
    "providers": [
        Case("providers", MIDDLE, "dense", providers=(*EAGER, "compile-bf16", *OURS)),
        Case("providers", MIDDLE, "labels", providers=(*EAGER, *OURS)),
        Case("providers", MIDDLE, "topk", providers=(*EAGER, *OURS)),
    ],
    "crop": [Case("crop", (1, 19, size, size)) for size in (128, 256, 512, 1024)],
    "batch": [Case("batch", (n, 19, 256, 256)) for n in (1, 2, 4, 8)],
    "net": [
        Case("net", (1, 19, 256, 256), kind, net="vgg19", providers=COMMON)
        for kind in ("labels", "dense")
    ],
    "lpips": [
        Case("lpips", shape, "images", peaked=False, net=LPIPS, providers=(*COMMON, "compile"))
        for shape in ((4, 3, 256, 256), (1, 3, 1024, 1024))
    ],
    "training": [
        Case("training", shape, "dense", peaked=False, providers=COMMON)
        for shape in ((16, 11, 32, 32), (2, 19, 256, 256))
    ],
}
