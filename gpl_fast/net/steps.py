"""A chain of layers as the fast path reads it: steps.

A *step* is one convolution and what follows it before the next: maybe a ReLU, then maybe a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpl_fast.net.layers import Layer

NO_CHAIN = "LossNet.from_module networks run on the reference: only chains have fast kernels"


@dataclass(frozen=True)
class Step:
    """A convolution, then maybe ReLU, then maybe a pool, and the layers' names for taps."""

    conv: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    relu: str = ""
    pool: str = ""
    pool_kind: str = ""  # "max" or "avg"


@dataclass(frozen=True)
class Chain:
    """A network of steps, and what stands before the first of them.

    ``in_channels`` enter the network: an adapter makes ``network_channels`` of them, then mean and
    std act, where there are such.
    """

    in_channels: int
    steps: tuple[Step, ...]
    adapter: bool
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    network_channels: int

    @property
    def front(self) -> bool:
        """Whether anything stands before the first convolution."""
        return self.adapter or self.mean is not None


def chain_of(
    layers: Sequence[Layer],
    *,
    in_channels: int,
    adapter: bool,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    network_channels: int,
) -> Chain | str:
    """The chain of a network of `layers`, none for one of modules, or the sentence that says why
    there is none."""
    if not layers:
        return NO_CHAIN
    steps: list[Step] = []
    for layer in layers:
        last = steps[-1] if steps else None
        if layer.kind in ("conv", "down"):
            strided = layer.kind == "down"
            sizes = layer.in_channels, layer.out_channels, layer.kernel_size
            relu = layer.name if strided else ""
            steps.append(Step(layer.name, *sizes, stride=2 if strided else 1, relu=relu))
        elif layer.kind == "relu" and last is not None:
            steps[-1] = replace(last, relu=layer.name)
        elif last is not None and last.relu and not last.pool:
            kind = layer.kind.removesuffix("pool")
            steps[-1] = replace(last, pool=layer.name, pool_kind=kind)
        else:
            return f"{layer.name} does not follow a ReLU: the fast kernels fuse ReLU and pool"
    return Chain(in_channels, tuple(steps), adapter, mean, std, network_channels)
