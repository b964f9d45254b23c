"""The paper's VGG-like structures: the arguments of `LossNet.vgg` as a chain of layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from gpl_fast.input_checks import Integer, as_int
from gpl_fast.net.layers import Layer, Part, named_chain

# Convolutions per block of the paper's networks (its Section 4.1).
STRUCTURES: Mapping[str, tuple[int, ...]] = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
KERNEL_SIZES = (1, 3, 5, 7)
POOLS = ("max", "avg", "stride")


def parse_blocks(net: str | Iterable[Integer]) -> tuple[int, ...]:
    """``"vgg19"``, ``"2,2,4,4,4"`` or ``[2, 2, 4, 4, 4]`` -> convolutions per block.

    Raises:
        ValueError: neither a known name nor a list of positive integers.
    """
    if isinstance(net, str) and net in STRUCTURES:
        return STRUCTURES[net]
    try:
        parts = [int(part) for part in net.split(",")] if isinstance(net, str) else net
        blocks = tuple(as_int("net", n) for n in parts)
    except (TypeError, ValueError):
        blocks = ()
    if not blocks or min(blocks) < 1:
        known = ", ".join(repr(name) for name in STRUCTURES)
        raise ValueError(
            f"net: got {net!r}, expected one of {known}, or convolutions per block such as "
            "'1,1,1,1,1', or a LossNet (LossNet.vgg, .from_sequential, .from_module, .load)"
        )
    return blocks


class Structure(NamedTuple):
    """The arguments of `LossNet.vgg` that give its chain."""

    in_channels: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    kernel_size: int
    pool: str

    @classmethod
    def checked(
        cls,
        in_channels: Integer,
        blocks: Iterable[Integer],
        widths: Iterable[Integer],
        kernel_size: Integer,
        pool: str,
    ) -> Structure:
        """Raises: ValueError, as `LossNet.vgg`."""
        c = check_channels(in_channels)
        counts, wide = _positive("blocks", blocks), _positive("widths", widths)
        if not counts:
            raise ValueError("blocks: got none, expected integers >= 1, one for each block")
        if len(wide) < len(counts):
            raise ValueError(
                f"widths: got {wide}, expected {len(counts)} integers >= 1, one for each block"
            )
        k = as_int("kernel_size", kernel_size, f"one of {KERNEL_SIZES}")
        if k not in KERNEL_SIZES:
            raise ValueError(f"kernel_size: got {kernel_size!r}, expected one of {KERNEL_SIZES}")
        if pool not in POOLS:
            raise ValueError(f"pool: got {pool!r}, expected one of {POOLS}")
        return cls(c, counts, wide[: len(counts)], k, pool)

    def layers(self) -> list[Layer]:
        """A block is convolutions with their ReLUs and a down-sampling by 2."""
        parts: list[Part] = []
        for count, width in zip(self.blocks, self.widths, strict=True):
            parts += [Part("conv", width, self.kernel_size), Part("relu")] * count
            down = Part("down", width, self.kernel_size)
            parts.append(down if self.pool == "stride" else Part(f"{self.pool}pool"))
        return named_chain(self.in_channels, parts)


def check_channels(in_channels: Integer) -> int:
    """Raises: ValueError if `in_channels` is not an integer >= 1."""
    c = as_int("in_channels", in_channels, "an integer >= 1")
    if c < 1:
        raise ValueError(f"in_channels: got {in_channels!r}, expected an integer >= 1")
    return c


def _positive(what: str, numbers: Iterable[Integer]) -> tuple[int, ...]:
    expected = "a list of integers >= 1, one for each block"
    if isinstance(numbers, str) or not isinstance(numbers, Iterable):
        raise ValueError(f"{what}: got {numbers!r}, expected {expected}")
    given = tuple(numbers)
    out = tuple(as_int(what, n, expected) for n in given)
    if any(n < 1 for n in out):
        raise ValueError(f"{what}: got {given}, expected {expected}")
    return out
