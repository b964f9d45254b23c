"""The order in which the interpreter runs the programs of a launch: a GPU promises none."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from triton.runtime import interpreter

Program = tuple[int, int, int]
Order = Callable[[list[Program]], Sequence[Program]]


def forward(programs: list[Program]) -> Sequence[Program]:
    return programs


def backward(programs: list[Program]) -> Sequence[Program]:
    return programs[::-1]


def shuffled(programs: list[Program]) -> Sequence[Program]:
    return random.Random(len(programs)).sample(programs, len(programs))


ORDERS: tuple[Order, ...] = (forward, backward, shuffled)
_order: Order = forward


@contextmanager
def program_order(order: Order) -> Iterator[None]:
    """Launches inside run the programs that `order` returns, in that order: it may leave some out.

    `program_order(lambda programs: programs[-1:])` runs the last one only, which is how a test
    reaches the far end of a tensor that would take hours.
    """
    global _order
    before, _order = _order, order
    try:
        yield
    finally:
        _order = before


class _Programs:
    """Stands where the kernel's function stood: collects the programs, runs them with the last."""

    def __init__(self, fn: Callable) -> None:
        self._fn = fn
        self._collected: list[Program] = []
        # what the interpreter reads off a function
        self.__signature__ = inspect.signature(fn)
        self.__globals__, self.__name__ = fn.__globals__, fn.__name__
        self.__annotations__ = fn.__annotations__

    def __call__(self, **arguments) -> None:
        builder = interpreter.interpreter_builder
        self._collected.append(builder.grid_idx)
        if builder.grid_idx != tuple(size - 1 for size in builder.grid_dim):
            return
        programs, self._collected = self._collected, []
        with np.errstate(all="ignore"):  # a GPU is silent on infinities and NaN, too
            for program in _order(programs):
                builder.set_grid_idx(*program)
                self._fn(**arguments)


def install() -> None:
    """Once a process."""
    shipped = interpreter.GridExecutor.__init__

    def __init__(self, fn, *args, **kwargs):
        shipped(self, fn, *args, **kwargs)
        self.fn = _Programs(fn)

    interpreter.GridExecutor.__init__ = __init__
