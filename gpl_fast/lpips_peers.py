"""LPIPS as other packages hold it, read: `lpips.LPIPS`, torchmetrics' metric. Neither is imported.

Sources: the packages lpips 0.1.4 and torchmetrics 1.9.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from gpl_fast.net.lossnet import LossNet


class Package(NamedTuple):
    """Where the classes of a package are, and the norm that it divides by."""

    modules: tuple[str, ...]
    model: str
    trunks: tuple[str, ...]
    eps: float
    eps_inside: bool


LPIPS = Package(
    ("lpips.lpips", "lpips.pretrained_networks"),
    "LPIPS",
    ("vgg16", "alexnet", "squeezenet"),
    1e-10,
    False,
)
TORCHMETRICS = Package(
    ("torchmetrics.functional.image.lpips",),
    "_LPIPS",
    ("Vgg16", "Alexnet", "SqueezeNet"),
    1e-8,
    True,
)
METRIC = ("torchmetrics.image.lpip", "LearnedPerceptualImagePatchSimilarity")


class Peer(NamedTuple):
    """A package's model, and the keywords of `gpl_fast.LPIPS` that equal its settings."""

    model: nn.Module
    package: Package
    words: dict[str, Any]


def known_peer(given: object) -> Peer:
    """Raises: TypeError, ValueError if it is neither of the two, or one that computes otherwise."""
    words: dict[str, Any] = {}
    model = given
    if _is(given, METRIC[:1], METRIC[1:], "update"):
        words = {"normalize": given.normalize, "reduction": given.reduction or "none"}  # type: ignore[attr-defined]
        model = given.net  # type: ignore[attr-defined]
    package = next((p for p in (LPIPS, TORCHMETRICS) if _is(model, p.modules, (p.model,))), None)
    if package is None or not isinstance(model, nn.Module):
        raise TypeError(
            f"LPIPS.from_module: got {type(given).__module__}.{type(given).__qualname__}, expected "
            "an lpips.LPIPS or torchmetrics' LearnedPerceptualImagePatchSimilarity as they come, "
            "of a wrapper its .module; anything else: LPIPS(LossNet.from_sequential(trunk, mean=…, "
            "std=…), heads={layer: weights})"
        )
    if getattr(model, "resize", None) is not None:
        raise ValueError(
            f"LPIPS.from_module: got resize={model.resize}, expected None; resize the images "
            "(F.interpolate) before the loss"
        )
    if model.spatial:
        words |= {"spatial": True}
    return Peer(model, package, {"eps": package.eps, "eps_inside": package.eps_inside, **words})


def read_model(copied: nn.Module, package: Package) -> tuple[LossNet, dict[str, Tensor | None]]:
    """The network and the heads of a copy without hooks, for inputs in [-1, 1].

    Raises:
        ValueError: a part that is not the package's.
    """
    scaled = getattr(copied, "version", "0.1") == "0.1"  # as the package's forward asks
    headed = bool(getattr(copied, "lpips", True))
    lins: list[Any] = list(copied.lins) if headed else []  # type: ignore[arg-type]
    parts = [("net", package.trunks), *([("scaling_layer", ("ScalingLayer",))] if scaled else [])]
    parts += [(f"lins.{i}", ("NetLinLayer",)) for i in range(len(lins))]
    for name, classes in parts:
        module = copied.get_submodule(name)
        if not _is(module, package.modules, classes):
            raise ValueError(
                f"LPIPS.from_module: {name}: got a {type(module).__qualname__}, expected "
                f"{' or '.join(classes)} as the package has it; build the loss by "
                "LPIPS(LossNet.from_module(trunk, taps=…), heads={layer: weights})"
            )
    mean = std = None
    if scaled:
        layer: Any = copied.scaling_layer
        mean, std = (t.double().flatten().tolist() for t in (layer.shift, layer.scale))
    net, taps = _network(_slices(copied.net), mean, std)
    heads: Sequence[Any] = [x.model[-1].weight.flatten() for x in lins] or [None] * len(taps)
    return net, dict(zip(taps, heads, strict=True))


def _slices(trunk: Any) -> list[nn.Sequential]:
    if hasattr(trunk, "slices"):
        return list(trunk.slices)
    return [getattr(trunk, f"slice{i}") for i in range(1, trunk.N_slices + 1)]


def _network(
    slices: list[nn.Sequential], mean: list[float] | None, std: list[float] | None
) -> tuple[LossNet, tuple[str, ...]]:
    """The trunk and the layers that end its slices: a chain where it is one."""
    try:
        flat = nn.Sequential(*(m for part in slices for m in part))
        net = LossNet.from_sequential(flat, mean=mean, std=std)
        if len(net.layers) == len(flat):
            ends = [sum(len(part) for part in slices[: i + 1]) for i in range(len(slices))]
            return net, tuple(net.layers[end - 1].name for end in ends)
    except ValueError:
        pass  # strides, or Fire modules: any module runs on the reference
    taps = {f"relu{i}": str(i - 1) for i in range(1, len(slices) + 1)}
    net = LossNet.from_module(nn.Sequential(*slices), taps, mean=mean, std=std)
    return net, tuple(taps)


def _is(
    given: object, modules: Sequence[str], names: Sequence[str], method: str = "forward"
) -> bool:
    """Whether `given` is of a class of these names, or of one that computes the same."""
    for base in type(given).__mro__:
        if base.__module__ in modules and base.__name__ in names:
            same = getattr(type(given), method, None) is getattr(base, method, None)
            return same and (method != "forward" or "forward" not in vars(given))
    return False
