"""What a GPU would not report: wrong addresses, programs in each other's way, float atomics.

Every pointer carries, above its 48 address bits, the number of the argument it came from, so an
address is held against the tensor that it was made for. Shadow arrays remember for each element
which program of which launch wrote and read it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

ADDRESS_BITS = 48
ADDRESS_MASK = np.uint64((1 << ADDRESS_BITS) - 1)
DENSE_SHADOW = 1 << 27  # elements; a longer one is a file with holes

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle


class KernelFault(Exception):
    """The interpreter wraps it, message and all, in its InterpreterError."""


def _zeros(length: int) -> np.ndarray:
    if length <= DENSE_SHADOW:
        return np.zeros(length, np.int32)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.int32, "w+", shape=(length,))


class Shadow:
    """Of a storage seen as elements of one size: the serial number of who came last, 0 = nobody."""

    def __init__(self, storage: torch.UntypedStorage, itemsize: int) -> None:
        self.storage = storage  # held, so that nobody else gets the address
        self.written = _zeros(storage.nbytes() // itemsize)
        self.read = _zeros(storage.nbytes() // itemsize)


class Argument:
    """A tensor that a launch was given."""

    def __init__(self, tensor: Tensor, position: int, shadow: Shadow) -> None:
        self.shape, self.position, self.shadow = tuple(tensor.shape), position, shadow
        self.itemsize = tensor.element_size()
        self.start = tensor.storage_offset()
        self.base = tensor.untyped_storage().data_ptr()
        dims = [(s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if s and n > 1]
        self.dims = sorted(dims, reverse=True)
        self.numel = tensor.numel()
        self.dense = sum(s * (n - 1) for s, n in dims) + 1 == self.numel

    def holds(self, elements: np.ndarray) -> np.ndarray:
        """Which storage elements, int64, are the tensor's: a view's gaps and ends are not."""
        rest = elements - self.start
        if self.dense or not self.numel:
            return (rest >= 0) & (rest < self.numel)
        inside = rest >= 0
        for stride, size in self.dims:
            steps = np.minimum(rest // stride, size - 1)
            rest = rest - steps * stride
        return inside & (rest == 0)

    def __str__(self) -> str:
        return f"tensor argument {self.position} of shape {self.shape}"


@dataclass
class Sanitizer:
    shadows: dict[tuple[int, int], Shadow] = field(default_factory=dict)
    arguments: list[Argument] = field(default_factory=list)
    exclusive: bool = True
    serial: int = 0  # of the launch; its programs count on from there
    programs: int = 0

    # ------------------------------------------------------------------------------- for the tests

    def forget(self) -> None:
        """Let go of every storage seen."""
        self.shadows.clear()
        self.arguments.clear()
        self.serial = self.programs = 0

    def unwritten(self, tensor: Tensor) -> Tensor:
        """Bool, of the tensor's shape: what no kernel stored since the test began."""
        storage = tensor.untyped_storage()
        shadow = self.shadows.get((storage.data_ptr(), tensor.element_size()))
        if shadow is None:
            return torch.ones(tensor.shape, dtype=torch.bool)
        written = torch.from_numpy(shadow.written)
        return written.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()) == 0

    @contextmanager
    def equal_writes_allowed(self) -> Iterator[None]:
        """Programs may store to one address, as long as they store the same bits."""
        self.exclusive = False
        try:
            yield
        finally:
            self.exclusive = True

    # -------------------------------------------------------------------------- for the interpreter

    def begin_launch(self) -> None:
        self.serial += self.programs + 1
        self.programs = 0
        self.arguments.clear()

    def register(self, tensor: Tensor) -> int:
        """The tag of a tensor argument, from 1."""
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.element_size())
        if key not in self.shadows:
            self.shadows[key] = Shadow(storage, tensor.element_size())
        position = len(self.arguments)
        self.arguments.append(Argument(tensor, position, self.shadows[key]))
        return position + 1

    def program(self) -> int:
        """The running program's serial number."""
        builder = interpreter.interpreter_builder
        (x, y, z), (_, height, depth) = builder.grid_idx, builder.grid_dim
        number = (x * height + y) * depth + z + 1
        self.programs = max(self.programs, number)
        return self.serial + number

    def load(self, pointers: Handle, mask: np.ndarray) -> None:
        me = self.program()
        for argument, elements, _ in self._places(pointers, mask, "load"):
            shadow = argument.shadow
            writer = shadow.written[elements]
            self._report((writer > self.serial) & (writer != me), "read", "wrote", writer, argument)
            reader = shadow.read[elements]
            alone = (reader < self.serial) | (reader == me)
            shadow.read[elements] = np.where(alone, me, self.serial)  # the launch's own: several

    def store(self, pointers: Handle, values: np.ndarray, mask: np.ndarray) -> None:
        me = self.program()
        for argument, elements, chosen in self._places(pointers, mask, "store"):
            shadow = argument.shadow
            reader = shadow.read[elements]
            others = (reader >= self.serial) & (reader != me)
            self._report(others, "wrote", "read", reader, argument)
            writer = shadow.written[elements]
            others = (writer > self.serial) & (writer != me)
            if not self.exclusive and others.any():
                differs = self._differs(pointers, values, mask, chosen)
                others &= np.resize(differs, len(elements))  # a wide store reaches two elements
            self._report(others, "wrote", "wrote", writer, argument)
            shadow.written[elements] = me

    def atomic(self, pointers: Handle, mask: np.ndarray) -> None:
        for argument, elements, _ in self._places(pointers, mask, "atomic"):
            argument.shadow.written[elements] = self.serial

    def _places(
        self, pointers: Handle, mask: np.ndarray, verb: str
    ) -> Iterator[tuple[Argument, np.ndarray, np.ndarray]]:
        """(argument, storage elements, which of the chosen pointers), for each argument reached."""
        tagged = pointers.data[_chosen(pointers, mask)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        tags = (tagged >> np.uint64(ADDRESS_BITS)).astype(np.int64)
        one = tags.size and (tags == tags[0]).all()  # nearly always, and sorting takes time
        for tag in tags[:1] if one else np.unique(tags):
            here = tags == tag
            if not 0 < tag <= len(self.arguments):
                raise KernelFault(
                    f"{verb} out of bounds in program {interpreter.interpreter_builder.grid_idx}: "
                    f"{here.sum()} addresses of no argument"
                )
            argument = self.arguments[tag - 1]
            offset = (tagged[here] & ADDRESS_MASK).astype(np.int64) - argument.base
            elements = offset // argument.itemsize
            inside = argument.holds(elements)
            if size > argument.itemsize:  # a wider view of the argument: its last element, too
                last = (offset + size - 1) // argument.itemsize
                inside &= argument.holds(last)
                elements = np.concatenate([elements, last])
            if not inside.all():
                worst = elements[: len(inside)][~inside] - argument.start
                raise KernelFault(
                    f"{verb} out of bounds in program {interpreter.interpreter_builder.grid_idx}: "
                    f"{len(worst)} of {len(inside)} addresses are not {argument}'s, "
                    f"the first {worst[0]} elements from its start"
                )
            yield argument, elements, here

    def _differs(self, pointers, values, mask, chosen) -> np.ndarray:
        pick = _chosen(pointers, mask)
        new = np.broadcast_to(values, pointers.data.shape)[pick][chosen]
        addresses = pointers.data[pick][chosen] & ADDRESS_MASK
        old = interpreter._interpreter.load(
            addresses, np.ones(len(new), bool), np.zeros_like(new), new.dtype
        )
        width = f"u{new.dtype.itemsize}"
        return old.view(width) != new.view(width)

    def _report(self, faults, mine: str, theirs: str, who: np.ndarray, argument: Argument) -> None:
        if not faults.any():
            return
        grid = interpreter.interpreter_builder.grid_dim
        other = int(who[faults][0]) - self.serial - 1
        name = "several programs" if other < 0 else f"program {np.unravel_index(other, grid)}"
        raise KernelFault(
            f"race: program {interpreter.interpreter_builder.grid_idx} {mine} "
            f"{int(faults.sum())} elements of {argument} that {name} {theirs}"
        )


current = Sanitizer()


# ----------------------------------------------------------------------------------------- install


def install() -> None:
    """Once a process, after the repairs."""
    _tag_arguments()
    _check_memory_operations()


def _tag_arguments() -> None:
    shipped_call, shipped_convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt

    def __call__(self, *args, **kwargs):
        current.begin_launch()
        return shipped_call(self, *args, **kwargs)

    def _implicit_cvt(arg):
        converted = shipped_convert(arg)
        if hasattr(arg, "data_ptr"):
            tag = current.register(interpreter._unwrap_tensor(arg))
            converted.handle.data = converted.handle.data | np.uint64(tag << ADDRESS_BITS)
        return converted

    interpreter.GridExecutor.__call__ = __call__
    interpreter._implicit_cvt = _implicit_cvt


def _chosen(pointers: Handle, mask: np.ndarray) -> np.ndarray:
    """The mask as booleans: the interpreter's are integers where a scalar took part."""
    return np.broadcast_to(np.asarray(mask) != 0, pointers.data.shape)


def _address(pointers: Handle) -> Handle:
    return Handle(pointers.data & ADDRESS_MASK, pointers.dtype)


def _check_memory_operations() -> None:
    shipped_load, shipped_store = Builder.create_masked_load, Builder.create_masked_store
    shipped_rmw, shipped_cas = Builder.create_atomic_rmw, Builder.create_atomic_cas

    def create_masked_load(self, ptrs, mask, *args, **kwargs):
        current.load(ptrs, mask.data)
        return shipped_load(self, _address(ptrs), mask, *args, **kwargs)

    def create_masked_store(self, ptrs, value, mask, *args, **kwargs):
        current.store(ptrs, value.data, mask.data)
        return shipped_store(self, _address(ptrs), value, mask, *args, **kwargs)

    def create_atomic_rmw(self, op, ptr, val, mask, *args):
        if op == interpreter._ir.ATOMIC_OP.FADD:
            raise KernelFault("atomic addition of floats: the result depends on the order")
        current.atomic(ptr, mask.data)
        return shipped_rmw(self, op, _address(ptr), val, mask, *args)

    def create_atomic_cas(self, ptr, *args):
        current.atomic(ptr, np.ones(ptr.data.shape, bool))
        return shipped_cas(self, _address(ptr), *args)

    Builder.create_masked_load, Builder.create_masked_store = (
        create_masked_load,
        create_masked_store,
    )
    Builder.create_atomic_rmw, Builder.create_atomic_cas = create_atomic_rmw, create_atomic_cas
