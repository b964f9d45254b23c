"""Tensors of the same images as one value: moved, pinned, indexed and mapped over together."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, KeyEntry, register_pytree_node

from gpl_fast.input_checks import FLOAT_DTYPES, Integer, describe, is_integer

B = TypeVar("B", bound="Batch")


class Batch:
    """What `gpl_fast.TopK` and `gpl_fast.TargetFeatures` share: tensors (N, ...) of N images."""

    def _map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``fn(tensor)`` for each tensor."""
        raise NotImplementedError

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same elsewhere, called as ``Tensor.to``; a dtype is for floating maps alone.

        Shape:
            Unchanged; masks, labels and indices keep their dtype.

        Raises:
            TypeError: a dtype that is not float16, bfloat16, float32 or float64.
        """
        for a in (*args, *kwargs.values()):
            dtype = a.dtype if isinstance(a, Tensor) else a
            if isinstance(dtype, torch.dtype) and dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{type(self).__name__}.to: got {dtype}, expected a device or one of "
                    f"{FLOAT_DTYPES}; a tensor's device: use .to(tensor.device)"
                )
        return self._map(lambda t: _moved(t, args, kwargs))

    def pin_memory(self) -> Self:
        """The same in page-locked memory: what a DataLoader with ``pin_memory=True`` calls.

        Shape:
            Unchanged, of tensors on the CPU.

        Raises:
            RuntimeError: of PyTorch, without a GPU or for tensors that lie on one.
        """
        return self._map(lambda t: t.pin_memory())

    def __len__(self) -> int:
        """N, the number of images."""
        raise NotImplementedError

    def __getitem__(self, index: Integer | slice | Tensor | Sequence[int]) -> Self:
        """Some of the images, a batch again.

        Args:
            index: an integer (the batch dimension stays, with N = 1), a slice, or a 1-d tensor,
                array or list of integers, or of N booleans.

        Raises:
            IndexError: an image that there is not, or another number of booleans than N.
            TypeError: an index of another kind.
        """
        images = _select(type(self).__name__, index, len(self))
        return self._map(lambda t: t[images])


def _moved(t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """``t.to(*args, **kwargs)``; what is no floating map (N, C, H, W) keeps its dtype, what is not
    4-d its strides.

    `Tensor.to` takes (dtype, ...), (device, dtype, ...) or (tensor, ...).
    """
    if t.dim() != 4:
        kwargs = {k: v for k, v in kwargs.items() if k != "memory_format"}
    if t.is_floating_point() and t.dim() == 4:
        return t.to(*args, **kwargs)
    own: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            own += [a.device, t.dtype]
        else:
            own.append(t.dtype if isinstance(a, torch.dtype) else a)
    kwargs = {k: t.dtype if isinstance(v, torch.dtype) else v for k, v in kwargs.items()}
    return t.to(*own, **kwargs)


def _select(what: str, index: object, n: int) -> slice | Tensor:
    """What picks the images `index` of N from each tensor, the batch dimension kept."""
    if isinstance(index, slice):
        return index
    if isinstance(index, list | range) or (hasattr(index, "ndim") and index.ndim > 0):
        try:
            several = index if isinstance(index, Tensor) else torch.as_tensor(index, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{what}: got an index that is no list of numbers: {error}") from None
        # An empty list is one of no images, not of no floats.
        return _select_several(what, several.long() if several.numel() == 0 else several, n)
    if isinstance(index, Tensor) and is_integer(index):
        return _select_several(what, index.reshape(1), n)
    try:
        if isinstance(index, bool | Tensor):
            raise TypeError
        i = operator.index(index)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(
            f"{what}: got the index {describe(index)}, expected an image's number, a slice, or a "
            "1-d tensor or list of numbers or of booleans"
        ) from None
    if not -n <= i < n:
        raise IndexError(f"{what}: got image {i}, expected one of {n}")
    return slice(i, i + 1 or None)


def _select_several(what: str, index: Tensor, n: int) -> Tensor:
    if index.dim() != 1 or not (is_integer(index) or index.dtype == torch.bool):
        raise TypeError(
            f"{what}: got the index {describe(index)}, expected 1-d integers or booleans"
        )
    if index.dtype == torch.bool:
        if len(index) != n:
            raise IndexError(f"{what}: got {len(index)} booleans, expected {n}, one for each image")
        return index
    index = index.long()  # uint8 would be taken for booleans
    if index.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = index[(index < -n) | (index >= n)]
        if len(wrong):
            raise IndexError(f"{what}: got images {wrong[:5].tolist()}, expected those of {n}")
    return index


def joined(what: str, parts: Sequence[Tensor]) -> Tensor:
    """``torch.cat`` of tensors (N_i, ...).

    Raises:
        ValueError: their other dimensions or devices differ.
    """
    check_same(f"{what}: shape", [tuple(t.shape[1:]) for t in parts])
    check_same(f"{what}: device", [t.device for t in parts])
    return torch.cat(list(parts))


def check_same(what: str, found: Sequence[object]) -> None:
    """Raises: ValueError if not all that was found is equal."""
    for x in found:
        if x != found[0]:
            raise ValueError(f"{what}: got {found[0]} and {x}, expected the same of all")


def as_items(what: str, items: Iterable[B], kind: type[B]) -> list[B]:
    """What `cat` joins, looked at any number of times.

    Raises:
        TypeError: something else is among it.
        ValueError: nothing is.
    """
    found = list(items)
    for x in found:
        if not isinstance(x, kind):
            raise TypeError(f"{what}: got {describe(x)}, expected {kind.__name__} alone")
    if not found:
        raise ValueError(f"{what}: got nothing, expected {kind.__name__} of the same settings")
    return found


def register(kind: type[Batch], parts: Sequence[str], *constants: str) -> None:
    """Make `kind` a pytree node: its `parts` are mapped over, its `constants` are kept.

    A part that is None is kept too: `tree_map` would hand it to a function of tensors.
    """

    def flatten_with_keys(x: Batch) -> tuple[list[tuple[KeyEntry, Any]], dict[str, Any]]:
        found = [(name, getattr(x, name)) for name in parts]
        kept = {name: getattr(x, name) for name in constants}
        kept |= {k: None for k, v in found if v is None}
        return [(GetAttrKey(k), v) for k, v in found if v is not None], kept

    def flatten(x: Batch) -> tuple[list[Any], dict[str, Any]]:
        keyed, kept = flatten_with_keys(x)
        return [part for _, part in keyed], kept

    def unflatten(mapped: Iterable[Any], kept: dict[str, Any]) -> Batch:
        # Not checked: what a tree is mapped to need not be tensors.
        x = object.__new__(kind)
        names = [name for name in parts if name not in kept]
        for name, value in (*kept.items(), *zip(names, mapped, strict=True)):
            object.__setattr__(x, name, value)
        return x

    register_pytree_node(
        kind,
        flatten,
        unflatten,
        serialized_type_name=f"gpl_fast.{kind.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def brief(x: object) -> str:
    """A tensor's dtype, shape and, unless it is the CPU, device; anything else's type."""
    if not isinstance(x, Tensor):
        return "None" if x is None else type(x).__name__
    where = "" if x.device.type == "cpu" else f" {x.device}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{where}"
