"""Any module, frozen: the copy of it, the copy in another dtype, and what a fingerprint reads."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gpl_fast.real_tensors import holds_values, real_tensors

OWN = frozenset(vars(nn.Module()))  # attributes of every module
KEPT_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Beside the hooks, the keys of those that are called in another way.
FLAGS = (
    "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
)  # fmt: skip
DROPPED_HOOKS = (
    "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks", "_state_dict_pre_hooks",
)  # fmt: skip


@real_tensors()
def frozen_copy(module: nn.Module) -> nn.Module:
    """A copy on the CPU, in eval mode, without gradients.

    Of its hooks those stay that are part of what it computes: what ``torch.nn.utils`` makes a
    weight with before each call (`weight_norm`, `spectral_norm`, pruning), and methods of its own
    modules, which become methods of their copies. A UserWarning names the forward hooks that do
    not stay.

    Raises:
        ValueError: weights that do not exist yet or hold no values, or what cannot be copied.
    """
    memo: dict[int, Any] = {}
    for path, m in module.named_modules():
        tensors = [*m.parameters(recurse=False), *m.buffers(recurse=False)]
        if not all(holds_values(t) for t in tensors):
            raise ValueError(
                f"from_module: got weights of {path or 'the module'!r} that hold no values (lazy, "
                "fake, or on the meta device), expected a module that is ready to run: load them, "
                "or run it once"
            )
        for hooks in (*KEPT_HOOKS, *FLAGS, *DROPPED_HOOKS):
            memo[id(getattr(m, hooks, None))] = OrderedDict()
        # What a pass has left in the module, such as weight_norm's weight: deepcopy refuses it.
        for _, t in (*plain_tensors(path, m), *m.named_buffers(recurse=False)):
            if not t.is_leaf:
                memo[id(t)] = t.detach().clone()
    memo.pop(id(None), None)
    try:
        copied = copy.deepcopy(module, memo)
        left_out = _give_hooks(module, copied, memo)
    except Exception as error:  # of any object that the module holds
        raise ValueError(
            f"from_module: got a {type(module).__name__} that copy.deepcopy cannot copy ({error}); "
            "remove the attribute that it holds, such as what an earlier pass has left in it, or "
            "give its class a __deepcopy__"
        ) from error
    if left_out:
        warnings.warn(
            f"from_module: the copy has no hooks of {left_out}: move what computes into forward, "
            "or remove hooks that only watch",
            UserWarning,
            stacklevel=4,  # who calls LossNet.from_module
        )
    for t in copied.parameters():
        t.detach_().requires_grad_(False)  # those of a scripted part are no leaves
    return copied.cpu().eval()


def _give_hooks(module: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> list[str]:
    """Give `copied` the hooks that are part of `module`; the paths of those that are not."""
    copies = dict(copied.named_modules())
    parts = {id(m) for m in module.modules()}
    left_out: list[str] = []
    for path, m in module.named_modules():
        for kind in KEPT_HOOKS:
            for i, (key, hook) in enumerate(getattr(m, kind, {}).items()):
                if not (_makes_a_weight(hook) or _is_method_of(hook, parts)):
                    left_out.append(path or "the module")
                    continue
                own = -1 - i  # below 0: no hook that is registered later has it, in any process
                getattr(copies[path], kind)[own] = copy.deepcopy(hook, memo)
                for flag in FLAGS:
                    if flag.startswith(kind) and key in getattr(m, flag):
                        getattr(copies[path], flag)[own] = True
    return list(dict.fromkeys(left_out))


def _makes_a_weight(hook: Callable[..., Any]) -> bool:
    return type(hook).__module__.startswith("torch.nn.utils.")


def _is_method_of(hook: Callable[..., Any], parts: set[int]) -> bool:
    """Whether `hook` is a method, with arguments or not, of one of the modules with these ids."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    return isinstance(hook, MethodType) and id(hook.__self__) in parts


def first_channels(module: nn.Module) -> int:
    """Input channels of its first convolution.

    Raises:
        ValueError: it has none.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            return m.in_channels
    raise ValueError("from_module: no Conv2d in the module, pass in_channels=")


def in_dtype(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A copy on `device`: floating tensors in `dtype`, complex ones in the complex dtype of it."""
    copied = copy.deepcopy(module).eval()  # copies of torch.fx's modules may be in training mode
    if not any(t.is_complex() for t in (*copied.parameters(), *copied.buffers())):
        return copied.to(device=device, dtype=dtype)

    def cast(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.is_floating_point() else t

    copied.to(device=device)._apply(cast)  # type: ignore[no-untyped-call]
    return copied


def module_text(module: nn.Module) -> str:
    """The structure: ``repr(module)`` without addresses, and as if no layer worked in place, which
    changes no tap."""
    tensors = [*module.parameters(), *module.buffers()]
    tensors += [t for path, m in module.named_modules() for _, t in plain_tensors(path, m)]
    shown = copy.deepcopy(module, {id(t): t for t in tensors})
    for m in shown.modules():
        if getattr(m, "inplace", None) is True:
            m.inplace = False  # type: ignore[assignment]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(shown))


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers, what else ``state_dict`` holds, and tensors that are plain attributes,
    but not what `torch.nn.utils` makes of others before each call."""
    tensors = dict(_named_tensors("", module.state_dict(keep_vars=True)))
    tensors |= dict(module.named_parameters(remove_duplicate=False))
    tensors |= dict(module.named_buffers(remove_duplicate=False))
    registered = {id(t) for t in tensors.values()}
    for path, m in module.named_modules():
        hooks = getattr(m, "_forward_pre_hooks", {}).values()
        made = {
            f"{path}.{getattr(hook, name)}".lstrip(".")
            for hook in hooks
            if _makes_a_weight(hook)
            for name in ("name", "_tensor_name")
            if hasattr(hook, name)
        }
        tensors |= {
            name: t
            for name, t in plain_tensors(path, m)
            if id(t) not in registered and name not in made
        }
    return tensors


def tensor_bytes(t: Tensor) -> bytes:
    """Shape, dtype and values, of any device and layout."""
    t = t.detach().cpu()
    if t.is_nested:
        t = t.to_padded_tensor(0.0)
    header = f"{tuple(t.shape)} {t.dtype}".encode()
    if t.is_quantized:
        t = t.dequantize()
    elif t.layout != torch.strided:
        t = t.to_dense()
    t = t.resolve_conj().resolve_neg().contiguous()
    return header + t.reshape(-1).view(torch.uint8).numpy().tobytes()


def plain_tensors(path: str, m: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that are plain attributes of `m`, or lie in lists, sets and dicts that are."""
    yield from _named_tensors(path, {k: v for k, v in vars(m).items() if k not in OWN})


def _named_tensors(name: str, value: Any, inside: tuple[int, ...] = ()) -> Iterator[Any]:
    if isinstance(value, Tensor):
        yield name, value
    elif id(value) not in inside:
        items: Any = ()
        if isinstance(value, Mapping):
            items = value.items()
        elif isinstance(value, list | tuple | set | frozenset | deque):
            items = enumerate(value)
        for key, inner in items:
            yield from _named_tensors(f"{name}.{key}".lstrip("."), inner, (*inside, id(value)))
