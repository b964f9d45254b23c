"""Outputs of named submodules of any module, for `LossNet.from_module`."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gpl_fast.input_checks import as_int

Taps = Mapping[str, str | tuple[str, int]] | Iterable[str]


class Tap(NamedTuple):
    """What a submodule returns at its n-th call of a pass, counted from 0."""

    path: str
    call: int = 0


def parse_taps(module: nn.Module, taps: Taps) -> dict[str, Tap]:
    """``{"name": "path"}``, ``{"name": ("path", call)}`` or ``["path", …]``.

    Raises:
        ValueError: none, an unknown path, or a call that is no integer >= 0.
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
    return parsed


def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without gradients and without the user's hooks.

    Kept are the hooks of ``torch.nn.utils`` that make a weight before each call (`weight_norm`,
    `spectral_norm`, pruning) and parametrizations.

    Raises:
        ValueError: weights that do not exist yet or that are on the meta device.
    """
    memo: dict[int, Any] = {}
    for name, m in module.named_modules():
        tensors = [*m.parameters(recurse=False), *m.buffers(recurse=False)]
        if any(is_lazy(t) or t.is_meta for t in tensors):
            raise ValueError(
                f"from_module: got weights of {name or 'the module'!r} that hold no values (lazy, "
                "or on the meta device), expected a module that is ready to run: load them, or "
                "run it once"
            )
        for hooks in ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks",
                      "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
                      "_forward_pre_hooks_with_kwargs"):  # fmt: skip
            memo[id(getattr(m, hooks, None))] = OrderedDict()
        before = getattr(m, "_forward_pre_hooks", {})
        memo[id(before)] = OrderedDict((k, h) for k, h in before.items() if _makes_a_weight(h))
        # What a pass has left in the module, such as weight_norm's weight: deepcopy refuses it.
        for t in vars(m).values():
            if isinstance(t, Tensor) and not t.is_leaf:
                memo[id(t)] = t.detach().clone()
    memo.pop(id(None), None)
    return copy.deepcopy(module, memo).cpu().eval().requires_grad_(False)


def _makes_a_weight(hook: Callable[..., Any]) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


class _AllReached(BaseException):
    """Ends a pass at its last tap. No Exception: the module may catch those."""


class _Pass:
    """One pass: the taps that it is asked for, and what it has found."""

    def __init__(self, wanted: Sequence[str]) -> None:
        self.wanted = wanted
        self.calls: dict[str, int] = {}
        self.outputs: dict[str, Any] = {}


class TappedModule(nn.Module):
    """Any module that also returns what its submodules put out; made for one device and dtype."""

    def __init__(self, module: nn.Module, taps: Mapping[str, Tap]) -> None:
        super().__init__()
        self.module, self.taps = module, dict(taps)
        self.running = threading.local()  # `_Pass` of each thread
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
            ValueError: a tap that is not reached, or whose output is not one floating 4-D tensor.
        """
        taps = tuple(dict.fromkeys(taps))
        if not taps:
            return {}
        found = _Pass(taps)
        self.running.found = found
        try:
            self.module(y.clone())  # its first layer may write to it
        except _AllReached:
            pass
        finally:
            self.running.found = None
        return {name: self._checked(name, found) for name in taps}

    def _checked(self, name: str, found: _Pass) -> Tensor:
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
        return e
