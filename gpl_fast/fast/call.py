"""One call of the fast path: everything static about it but the tensors' shapes.

Hashable, so that what follows from it is worked out once. It crosses the operators as text: they
take no other constant than numbers and words, and torch.compile guards on those.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from gpl_fast import distance
from gpl_fast.distance import Distance
from gpl_fast.net.steps import Chain, Step

# What the backward reads of the target's tensors.
KEPT = ("valid", "ce_labels", "ce_mask", "class_weight", "pos_weight", "multi_hot")
LOOKED_UP = ("labels", "topk")  # kinds that enter the first convolution as rows of a table


@dataclass(frozen=True)
class Call:
    """See the fields.

    Attributes:
        policy: name of who decides; `policy.named`.
        network: key of the network's weights; `net.weights.of`.
        chain: the network without its weights.
        features, styles: weight of each tapped layer.
        distance: how features are compared.
        kind: of the target: "dense", "labels", "topk" or "features".
        encode: there is no prediction: the target's features are what is asked for.
        resized: a dense target of another size, or in float64: rows of it are made anew.
        activation, target_activation, temperature: as `Options`.
        cross_entropy, label_smoothing: the one that shares the passes over the logits; binary where
            there are labels of single elements, `multi_hot`.
        elements: those that these do not count leave the perceptual terms too.
        weighed: the cross-entropy, by a mask; where it has no ``ce_mask`` of its own, by `valid`.
        spatial: the distance of each pixel is asked for, at taps of normalised features.
        signs: those of differences will be taken, which have to be 0 where features are equal.
        dtype: of the network's maps.
        workspace_mb: bound on transient memory, in 2^20 bytes; None = "auto".
        tensors: names of the target's tensors, in the operators' order.
    """

    policy: str
    network: str
    chain: Chain
    features: tuple[tuple[str, float], ...]
    styles: tuple[tuple[str, float], ...]
    kind: str
    activation: str
    target_activation: str
    temperature: float
    dtype: torch.dtype
    workspace_mb: float | None
    tensors: tuple[str, ...] = ()
    encode: bool = False
    resized: bool = False
    cross_entropy: bool = False
    label_smoothing: float = 0.0
    distance: Distance = field(default_factory=Distance)
    elements: bool = False
    weighed: bool = False
    spatial: bool = False
    signs: bool = False

    @functools.cached_property
    def text(self) -> str:
        """For `read`."""
        words = {"dtype": str(self.dtype).removeprefix("torch."), "distance": self.distance.text}
        return json.dumps({**asdict(self), **words})

    @functools.cached_property
    def taps(self) -> tuple[str, ...]:
        """The layers that are compared."""
        return tuple(dict.fromkeys(name for name, _ in (*self.features, *self.styles)))

    @functools.cached_property
    def styled(self) -> frozenset[str]:
        """The layers whose styles are compared."""
        return frozenset(name for name, _ in self.styles)

    @functools.cached_property
    def normalized(self) -> frozenset[str]:
        """The layers whose features are compared over their norms."""
        return frozenset(name for name, _ in self.features if self.distance.normalize)

    @functools.cached_property
    def squared(self) -> frozenset[str]:
        """The layers whose seed is δ itself: of its squares, all of one weight."""
        taps = (name for name, _ in self.features if f"weight.{name}" not in self.tensors)
        return frozenset(taps if self.distance.plain else ())

    @functools.cached_property
    def plain(self) -> bool:
        """Whether only one branch goes through: nothing has the target's pre-activations."""
        return self.encode or self.kind == "features"

    @functools.cached_property
    def branches(self) -> bool:
        """Whether either branch may be carried: float32 has bits enough to carry y' always."""
        return not self.plain and self.dtype != torch.float32

    @functools.cached_property
    def looked_up(self) -> bool:
        """Whether the target enters the first convolution as rows of a table."""
        return not self.encode and self.kind in LOOKED_UP

    @functools.cached_property
    def front(self) -> bool:
        """Whether an input adapter, or mean and std, stand before the first convolution."""
        return self.chain.front

    @property
    def own_ce_lse(self) -> bool:
        """Whether the cross-entropy's log-sum-exp is another one than the activation's."""
        own = self.activation != "softmax" or self.temperature != 1.0
        return self.cross_entropy and not self.binary and own

    @functools.cached_property
    def binary(self) -> bool:
        """Whether each class has labels of its own."""
        return "multi_hot" in self.tensors

    def named(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The target's tensors by name: the labels are the cross-entropy's too where it has none
        of its own, and those of single elements the dense target where there is no other."""
        out = dict(zip(self.tensors, tensors, strict=True))
        if self.binary:
            if self.kind == "dense":
                out.setdefault("dense", out["multi_hot"])
            if self.elements:
                out["elements"] = out["multi_hot"]
        elif self.cross_entropy and "ce_labels" not in out:
            out["ce_labels"] = out["labels"]
        return self.with_mask(out) if self.weighed else out

    def with_mask(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same, with the mask by which the cross-entropy is weighed by its name."""
        return tensors if "ce_mask" in tensors else {**tensors, "ce_mask": tensors["valid"]}

    @functools.cached_property
    def kept(self) -> tuple[str, ...]:
        """Names of what the backward reads of `tensors`, in their order."""
        return tuple(name for _, name in kept_of(self.tensors, self.cross_entropy))


def kept_of(tensors: Sequence[str], cross_entropy: bool) -> tuple[tuple[int, str], ...]:
    """Which of the target's tensors the backward reads: places and names."""
    shared = cross_entropy and not {"ce_labels", "multi_hot"} & set(tensors)
    kept = []
    for i, name in enumerate(tensors):
        if name in KEPT:
            kept.append((i, name))
        elif shared and name == "labels":
            kept.append((i, "ce_labels"))
    return tuple(kept)


@functools.lru_cache(maxsize=256)
def read(text: str) -> Call:
    """The Call of a text."""
    d = json.loads(text)
    chain = d["chain"]
    for name in ("mean", "std"):
        chain[name] = None if chain[name] is None else tuple(chain[name])
    chain["steps"] = tuple(Step(**step) for step in chain["steps"])
    d["chain"] = Chain(**chain)
    for name in ("features", "styles"):
        d[name] = tuple((tap, weight) for tap, weight in d[name])
    d["tensors"] = tuple(d["tensors"])
    d["dtype"] = getattr(torch, d["dtype"])
    d["distance"] = distance.read(d["distance"])
    return Call(**d)
