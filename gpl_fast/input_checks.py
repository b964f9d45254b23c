"""What the checks of arguments share: kinds of tensors and numbers, words for what was got."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, SupportsFloat, SupportsIndex

import torch
from torch import Tensor

from gpl_fast.graphs import constant

Number = float | SupportsFloat  # Python's too: jsonargparse takes the annotations at their word
Integer = int | SupportsIndex

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (
    torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
)  # fmt: skip


def is_integer(t: Tensor) -> bool:
    """Whether `t` holds integers: bool, quantized and complex values are none."""
    return t.dtype in INTEGER_DTYPES


def describe(x: object) -> str:
    """Dtype and shape of a tensor, the type of anything else: what an error says was got."""
    return f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def check_tensor(what: str, x: object, expected: str) -> None:
    """Raises: TypeError if `x` is no tensor, or none with a plain layout in memory."""
    if isinstance(x, Tensor):
        kind = (
            "nested" if x.is_nested
            else "quantized" if x.is_quantized
            else "sparse" if x.layout != torch.strided
            else ""
        )  # fmt: skip
        if kind:
            way_out = {"nested": "to_padded_tensor(0.0)", "quantized": "dequantize()"}
            raise TypeError(
                f"{what}: got a {kind} tensor, expected {expected}; use "
                f".{way_out.get(kind, 'to_dense()')}"
            )
        return
    raise TypeError(f"{what}: got {type(x).__name__}, expected {expected}{_way_out(what, x)}")


def _way_out(what: str, x: object) -> str:
    if isinstance(x, Mapping):
        maps = [name for name, t in x.items() if isinstance(t, Tensor)]
        return f"; pass one of its maps, such as {what}[{maps[0]!r}], of {maps}" if maps else ""
    for name in ("logits", "out", "predicted_depth", "sample"):
        if isinstance(getattr(x, name, None), Tensor):
            return f"; pass its tensor, {what}.{name}"
    if isinstance(x, list | tuple):
        return (
            "; of several maps take one, or call the loss for each and add; of images torch.stack"
        )
    return "; use torch.from_numpy" if type(x).__module__ == "numpy" else ""


class TakesMaps(Protocol):
    """What a prediction is checked against: a network's channels and the sizes it can take."""

    in_channels: int

    def shapes(self, height: int, width: int) -> Any: ...


# The way out of another number of channels, which it is formatted with.
REMAKE = "make it with in_channels (num_classes) = {}, or fix the input"


def check_prediction(
    pred: Tensor, net: TakesMaps, needs_size: bool = True, remake: str = REMAKE
) -> None:
    """Raises: TypeError, ValueError if `pred` is not floating (N, in_channels, H, W) of a size."""
    channels = net.in_channels
    check_tensor("prediction", pred, f"a torch.Tensor (N, {channels}, H, W)")
    if pred.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"prediction: got {pred.dtype}, expected one of {FLOAT_DTYPES}; the prediction is the "
            "logits or maps, before any argmax, not class indices"
        )
    if pred.dim() != 4 or pred.shape[1] != channels:
        raise ValueError(
            f"prediction: got shape {tuple(pred.shape)}, expected (N, {channels}, H, W), "
            f"the channels that the loss was made for; {way_out_of_shape(pred, channels, remake)}"
        )
    if needs_size:
        net.shapes(pred.shape[2], pred.shape[3])


def way_out_of_shape(maps: Tensor, channels: int, remake: str = REMAKE) -> str:
    """How maps of another rank or number of channels become (N, channels, H, W)."""
    shape = tuple(maps.shape)
    if maps.dim() == 5:
        return (
            "a volume goes through in slices: use .transpose(1, 2).flatten(0, 1) of (N, C, D, H, W)"
        )
    if maps.dim() == 3 and channels == 1:
        return "maps (N, H, W) without their channel: use .unsqueeze(1)"
    if maps.dim() == 3 and shape[0] == channels:
        return "one image: use .unsqueeze(0)"
    if maps.dim() == 4 and shape[3] == channels:
        return "channels come second: use .permute(0, 3, 1, 2)"
    if maps.dim() == 4:
        return remake.format(shape[1])
    return "reshape it to four dimensions"


def as_float(what: str, x: Number | str, expected: str = "a number") -> float:
    """`x` as a float: Python's, numpy's and 0-dim tensors' numbers; not bool, not text.

    Raises:
        ValueError: anything else, or not finite.
    """
    try:
        # A number first: torch.compile knows little more of one that is a symbol in its graph.
        if type(x) not in (float, int) and (isinstance(x, bool | str | bytes) or _is_bool(x)):
            raise TypeError
        number = float(x)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"{what}: got {x!r}, expected {expected}") from None
    if not -sys.float_info.max <= number <= sys.float_info.max:  # a guard, which isfinite is not
        raise ValueError(f"{what}: got {x!r}, expected {expected}")
    return number


def as_int(what: str, x: Integer, expected: str = "an integer") -> int:
    """`x` as an int: Python's, numpy's and 0-dim tensors' integers; not bool, not 2.0.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(x, bool) and not _is_bool(x):
        try:
            return operator.index(x)
        except (TypeError, ValueError, RuntimeError):
            pass
    raise ValueError(f"{what}: got {x!r}, expected {expected}")


def as_float_dtype(what: str, value: object) -> torch.dtype | None:
    """A floating dtype or its name, "bfloat16" or "torch.bfloat16".

    Raises:
        ValueError: anything else.
    """
    for dtype in FLOAT_DTYPES:
        if value is dtype or value in (str(dtype), str(dtype).removeprefix("torch.")):
            return dtype
    if value is not None:
        known = ", ".join(map(str, FLOAT_DTYPES))
        raise ValueError(f"{what}: got {value!r}, expected None or one of {known}")
    return None


def as_weight(what: str, value: Number) -> float:
    """A number >= 0.

    Raises:
        ValueError: anything else.
    """
    number = as_float(what, value, "a number >= 0")
    if number < 0:
        raise ValueError(f"{what}: got {number}, expected a number >= 0")
    return number


def as_label_smoothing(value: Number) -> float:
    """A number in [0, 1].

    Raises:
        ValueError: anything else.
    """
    number = as_float("label_smoothing", value, "a number in [0, 1]")
    if not 0 <= number <= 1:
        raise ValueError(f"label_smoothing: got {number}, expected a number in [0, 1]")
    return constant(number)


def as_class_weight(
    weight: Tensor | Iterable[Number],
    channels: int,
    look: bool = True,
    what: str = "class_weight",
    each: str = "class",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A weight for each class, or each of something else, (C,) `dtype`: a copy, which a graph may
    save also where the weights were made under `torch.inference_mode`; the numbers are looked at
    once, where a loss is made.

    Raises:
        ValueError: not C finite numbers >= 0.
    """
    expected = f"({channels},): {channels} numbers, finite and >= 0, one weight a {each}"
    if isinstance(weight, Tensor) and weight.is_meta:
        raise ValueError(
            f"{what}: got a tensor on 'meta', which holds no numbers, expected "
            f"{expected}: a list of them is taken as it is under any default device"
        )
    try:
        if not isinstance(weight, Tensor):
            given = [as_float(what, w) for w in weight]
            weight = torch.tensor(given, dtype=dtype, device="cpu")
        with torch.inference_mode(False):
            copied = weight.detach().to(dtype, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}: got {weight!r}, expected {expected}") from error
    if tuple(copied.shape) != (channels,):
        raise ValueError(f"{what}: got shape {tuple(copied.shape)}, expected {expected}")
    if look and not (copied.isfinite() & (copied >= 0)).all():
        raise ValueError(f"{what}: got {copied.tolist()}, expected {expected}")
    return copied


MODES = ("multiclass", "binary", "multilabel")


def as_num_classes(value: Integer, mode: str = "multiclass") -> int:
    """C of a segmentation.

    Raises:
        ValueError: an unknown mode; not an integer that it takes.
    """
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {MODES}")
    expected = {
        "multiclass": "an integer >= 2; for one channel use mode='binary', or "
        "GenericPerceptualLoss(1, activation='sigmoid') beside a binary cross-entropy",
        "binary": "1 with mode='binary'; for several classes use mode='multilabel' (any number of "
        "them at a pixel) or 'multiclass' (one)",
        "multilabel": "an integer >= 1",
    }[mode]
    classes = as_int("num_classes", value, expected)
    if classes < (2 if mode == "multiclass" else 1) or (mode == "binary" and classes != 1):
        raise ValueError(f"num_classes: got {classes}, expected {expected}")
    return classes


def _is_bool(x: object) -> bool:
    return str(getattr(x, "dtype", "")).removeprefix("torch.") == "bool"
