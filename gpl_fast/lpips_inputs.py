"""What `LPIPS` is given: its words, and what stands in the place of the two images."""

from __future__ import annotations

from torch import Tensor

from gpl_fast.input_checks import FLOAT_DTYPES, Number, as_float, describe, way_out_of_shape


def check_flags(**words: object) -> None:
    """Raises: ValueError for what is not True or False, by name."""
    for name, word in words.items():
        if not isinstance(word, bool):
            raise ValueError(f"{name}: got {word!r}, expected True or False")


def as_eps(eps: Number) -> float:
    """Raises: ValueError for what is no number > 0."""
    number = as_float("eps", eps, "a number > 0")
    if number <= 0:
        raise ValueError(f"eps: got {number}, expected a number > 0")
    return number


def as_reduction(reduction: str | None, spatial: bool) -> str:
    """The word, or the usual one. Raises: ValueError for a map that is reduced."""
    if reduction is None:
        return "none" if spatial else "mean"
    if spatial and reduction != "none":
        raise ValueError(
            f"reduction: got {reduction!r} with spatial=True, expected 'none': the map "
            "(N, 1, H, W) is not reduced; spatial=False gives the mean of what is resized"
        )
    return reduction


def check_images(channels: int, pred: object, target: object) -> None:
    """Raises: TypeError, ValueError for tensors that are no images (N, C, H, W), with the way out;
    labels (N, H, W) and what is no tensor are looked at later."""
    for what, images in (("prediction", pred), ("target", target)):
        if isinstance(images, Tensor):
            _check(what, images, channels)


def _check(what: str, images: Tensor, channels: int) -> None:
    expected = f"(N, {channels}, H, W), floating images"
    if images.dim() == 4 and images.shape[1] == channels:
        if images.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{what}: got {images.dtype}, expected {expected}; use .float(), of bytes also "
                "/ 127.5 - 1, or / 255 with normalize=True"
            )
        return
    if what == "target" and images.dim() == 3 and images.dtype not in FLOAT_DTYPES:
        return
    raise ValueError(
        f"{what}: got {describe(images)}, expected {expected}; {_way_out(images, channels)}"
    )


def _way_out(images: Tensor, channels: int) -> str:
    repeat = f".expand(-1, {channels}, -1, -1)"
    if images.dim() == 4 and images.shape[1] == 1:
        return f"of grayscale images use x{repeat}"
    if images.dim() == 3 and images.shape[0] not in (1, channels):
        return f"of grayscale images use x.unsqueeze(1){repeat}"
    if images.dim() == 3 and images.shape[0] == 1:
        return f"of a grayscale image use x.unsqueeze(0){repeat}"
    if images.dim() == 4 and images.shape[3] == 1:
        return f"of grayscale images use x.permute(0, 3, 1, 2){repeat}"
    other = f"give the {channels} channels that the network is made for, without alpha"
    return way_out_of_shape(images, channels, other)
