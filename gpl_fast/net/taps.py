"""Outputs of named submodules of any module, for `LossNet.from_module`."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gpl_fast.input_checks import as_int
from gpl_fast.net.frozen_module import OWN

# What PyTorch says of a map that no kernel fits into.
TOO_SMALL = ("Kernel size can't be greater than actual input size", "Output size is too small")

Taps = Mapping[str, str | tuple[str, int]] | Iterable[str]


class Tap(NamedTuple):
    """What a submodule returns at its n-th call of a pass, counted from 0."""

    path: str
    call: int = 0


def parse_taps(module: nn.Module, taps: Taps) -> dict[str, Tap]:
    """``{"name": "path"}``, ``{"name": ("path", call)}`` or ``["path", …]``.

    Raises:
        ValueError: none, an unknown path, another path of a module that has one already, a path
            into a scripted module, or a call that is no integer >= 0.
    """
    known = dict(module.named_modules(remove_duplicate=False))
    if isinstance(taps, Mapping):
        named = list(taps.items())
    else:
        several = isinstance(taps, Iterable) and not isinstance(taps, str)
        named = [(path, path) for path in taps] if several else []
    parsed = {}
    for name, given in named:
        pair = tuple(given) if isinstance(given, tuple | list) else (given, 0)
        if len(pair) != 2 or not isinstance(pair[0], str) or not isinstance(name, str):
            raise ValueError(
                f"from_module: taps: got {name!r}: {given!r}, expected a name and a path, or a "
                "name and (path, call), call = 0 for the first output in a pass"
            )
        call = as_int(f"from_module: taps: call of {name!r}", pair[1], "an integer >= 0")
        if call < 0:
            raise ValueError(f"from_module: taps: call of {name!r}: got {call}, expected >= 0")
        parsed[name] = Tap(pair[0], call)
    unknown = [tap.path for tap in parsed.values() if tap.path not in known]
    if unknown or not parsed:
        raise ValueError(
            f"from_module: taps: got {unknown or 'none'}, expected paths of submodules, such "
            f"as {[name for name in known if name][:8]}"
        )
    for tap in parsed.values():
        _check_path(tap.path, known)
    return parsed


def _check_path(path: str, known: Mapping[str, nn.Module]) -> None:
    """Raises: ValueError if calls of the module at `path` cannot be told by it."""
    steps = path.split(".")
    around = {"", *(".".join(steps[:i]) for i in range(1, len(steps) + 1))}
    if any(isinstance(known[p], torch.jit.ScriptModule) for p in around):
        raise ValueError(
            f"from_module: taps: {path!r} is a scripted or traced module or a part of one, which "
            "cannot be tapped; pass the module that torch.jit made it of"
        )
    paths = [p for p, m in known.items() if m is known[path]]
    if path != paths[0]:
        raise ValueError(
            f"from_module: taps: {path!r} is the same module as {paths[0]!r}; ask for its n-th "
            f"call: ({paths[0]!r}, {paths.index(path)})"
        )


class _AllReached(BaseException):
    """Ends a pass at its last tap. No Exception: the module may catch those."""


class _Pass:
    """One pass: the taps that it is asked for, and what it has found."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self.wanted = wanted
        self.calls: dict[str, int] = {}
        self.outputs: dict[str, Any] = {}
        self.complete = False  # it ended by itself


class TappedModule(nn.Module):
    """Any module that also returns what its submodules put out; made for one device and dtype.

    A pass that stops at its last tap leaves no trace: the modes of gradients and autocast are the
    caller's again, and lists, dicts and sets that were empty at first are empty. What else a module
    sets and puts back only at its end, such as a ``@contextmanager`` without try and finally, stays
    as it is at the stop.
    """

    def __init__(self, module: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.module, self.taps = module, dict(taps)
        self.running = threading.local()  # `_Pass` of each thread
        # Where a pass keeps what it needs later on (`self.skips.append`).
        self.scratch = [
            value
            for m in module.modules()
            for name, value in vars(m).items()
            if name not in OWN and isinstance(value, list | dict | set | deque) and not value
        ]
        self.lock, self.passes = threading.Lock(), 0
        # Registered once and not at each call, which torch.compile could not trace.
        for path in dict.fromkeys(tap.path for tap in self.taps.values()):
            module.get_submodule(path).register_forward_hook(self._keep(path))

    def _keep(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            found: _Pass | None = getattr(self.running, "found", None)
            if found is None:  # a checkpoint inside of the module computes again
                return
            call = found.calls.get(path, 0)
            found.calls[path] = call + 1
            names = [name for name in found.wanted if self.taps[name] == (path, call)]
            last = len(found.outputs) + len(names) == len(found.wanted)
            # A copy, unless nothing runs that could write to the output.
            copied = isinstance(output, Tensor) and bool(names) and not last
            found.outputs.update(dict.fromkeys(names, output.clone() if copied else output))
            if last and names:
                raise _AllReached

        return keep

    def forward(self, y: Tensor, taps: Sequence[str]) -> dict[str, Tensor]:
        """Outputs ``(N, C_b, H_b, W_b)`` of `taps` for `y` (N, C, H, W), which is left as it is.

        Raises:
            ValueError: `y` is too small; a tap that is not reached, whose output is not one
                floating 4-D tensor, or has no gradient where `y` has one.
        """
        taps = tuple(dict.fromkeys(taps))
        if not taps:
            return {}
        found = _Pass(taps)
        self.running.found = found
        autocast = _autocast_of(y.device.type)
        self._begin()
        try:
            # The module may switch gradients by hand.
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                self.module(y.clone())  # its first layer may write to it
            found.complete = True
        except _AllReached:
            pass
        except RuntimeError as error:
            if not any(words in str(error) for words in TOO_SMALL):
                raise
            raise ValueError(
                f"from_module: got maps of size {tuple(y.shape[2:])}, which are too small for the "
                f"module ({error}), expected larger ones; use larger images, or F.interpolate them"
            ) from error
        finally:
            self.running.found = None
            if autocast is not None:
                torch.set_autocast_enabled(y.device.type, autocast)
            self._end(found)
        with_gradient = torch.is_grad_enabled() and y.requires_grad
        return {name: self._checked(name, found, with_gradient) for name in taps}

    def _begin(self) -> None:
        if self.scratch and not torch.compiler.is_compiling():
            with self.lock:
                self.passes += 1

    def _end(self, found: _Pass) -> None:
        """Empty what a pass that stopped half-way has filled, unless another thread is at it."""
        if not self.scratch:
            return
        if torch.compiler.is_compiling():
            self._empty(found)
            return
        with self.lock:
            self.passes -= 1
            if not self.passes:
                self._empty(found)

    def _empty(self, found: _Pass) -> None:
        if not found.complete:
            for container in self.scratch:
                container.clear()

    def _checked(self, name: str, found: _Pass, with_gradient: bool) -> Tensor:
        path, call = self.taps[name]
        what = f"from_module: tap {name!r} ({path})"
        if name not in found.outputs:
            raise ValueError(
                f"{what}: got {found.calls.get(path, 0)} calls until the module ended, expected at "
                f"least {call + 1}; tap a submodule that runs"
            )
        e = found.outputs[name]
        if not isinstance(e, Tensor) or e.dim() != 4 or not e.is_floating_point():
            got = f"{e.dtype} {tuple(e.shape)}" if isinstance(e, Tensor) else type(e).__name__
            raise ValueError(f"{what}: got {got}, expected one (N, C, H, W) tensor, floating")
        if with_gradient and not e.requires_grad:
            raise ValueError(
                f"{what}: got an output without a gradient, expected one that depends on the "
                "input: it would be a constant of the loss. The module turns gradients off "
                "(torch.no_grad, torch.inference_mode, .detach, checkpoint with "
                "use_reentrant=True: remove it, or use_reentrant=False), or this output does not "
                "depend on the input: tap another submodule"
            )
        return e


def _autocast_of(kind: str) -> bool | None:
    """Whether autocast is on for a type of device; None where no module can change it by hand."""
    if torch.compiler.is_compiling() or not torch.amp.is_autocast_available(kind):
        return None
    return torch.is_autocast_enabled(kind)
