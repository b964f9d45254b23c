"""Mean and standard deviation of the maps that enter a network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gpl_fast.input_checks import Number, as_float

Normalisation = Number | Iterable[Number]


def check_normalisation(
    mean: Normalisation | None, std: Normalisation | None, channels: int
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """`mean` and `std` as tuples of 1 or `channels` numbers: a number is one for all channels.

    Raises:
        ValueError: only one of them, other lengths, not finite numbers, or a std that is not > 0.
    """
    if mean is None and std is None:
        return None, None
    if mean is None or std is None:
        raise ValueError(f"mean, std: got {mean} and {std}, expected both or neither")
    means, stds = _numbers(mean), _numbers(std)
    for got in (means, stds):
        if len(got) not in (1, channels):
            raise ValueError(
                f"mean, std: got {len(got)} values, expected {channels}, one for each channel that "
                "enters the network, or one number for all"
            )
    if not all(s > 0 for s in stds):
        raise ValueError(f"mean, std: got {mean} and {std}, expected std > 0")
    count = max(len(means), len(stds))
    return means * (count // len(means)), stds * (count // len(stds))


def of_unit_range(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int
) -> tuple[list[float], list[float]]:
    """Mean and std of x in [0, 1] that equal those given of 2x - 1, in [-1, 1]."""
    means, stds = mean or channels * (0.0,), std or channels * (1.0,)
    return [(1 + m) / 2 for m in means], [s / 2 for s in stds]


def _numbers(given: Normalisation) -> tuple[float, ...]:
    if isinstance(given, str | bytes | Mapping):
        raise ValueError(f"mean, std: got {given!r}, expected numbers, one for each channel")
    try:
        values = list(iter(given))  # type: ignore[arg-type]
    except TypeError:  # a number, or an array or a tensor of no dimension
        values = [given]  # type: ignore[list-item]
    return tuple(as_float("mean, std", v, "finite numbers, one for each channel") for v in values)
