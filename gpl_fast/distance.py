"""How prediction's and target's features are compared at a tap."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Distance:
    """Section 3 of docs/math.md.

    Attributes:
        criterion: "l2", squares, or "l1", absolute values.
        normalize: the features are divided by their norm over channels first.
        eps, eps_inside: of that norm: ``sqrt(Σ φ² + eps)`` inside, else ``sqrt(Σ φ²) + eps``.
        text: all of it, for `read`: a constant in graphs, which floats of two losses are not.
    """

    criterion: str = "l2"
    normalize: bool = False
    eps: float = 1e-10
    eps_inside: bool = False
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        words = (self.criterion, str(int(self.normalize)), str(self.eps), str(int(self.eps_inside)))
        object.__setattr__(self, "text", " ".join(words))

    @property
    def plain(self) -> bool:
        """Whether it is eq. (1) as the paper has it."""
        return self.criterion == "l2" and not self.normalize

    @property
    def slope(self) -> float:
        """What the derivative has that the seed has not: the 2 of a square."""
        return 2.0 if self.criterion == "l2" else 1.0


def read(text: str) -> Distance:
    """The Distance of a text."""
    criterion, normalize, eps, inside = text.split()
    return Distance(criterion, normalize == "1", float(eps), inside == "1")
