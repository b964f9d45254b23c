"""Tests against the packages whose losses ours replace. Trunks have random weights: nothing is
downloaded."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from peer_losses import declare_operators

FILES = Path(sys.prefix) / "peers"  # of packages that are not installed: see the Makefile
if missing := [
    name
    for name in ("lpips", "piq", "torchmetrics", "monai", "torchvision")
    if find_spec(name) is None
] + [name for name in ("basicsr", "mmseg") if not (FILES / name).is_dir()]:
    raise pytest.UsageError(
        f"tests/peers: {', '.join(missing)} missing; `make test-peers` installs them"
    )

declare_operators()  # before anything imports torchvision
from torchvision.models import _api, alexnet, resnet50, squeezenet1_1, vgg  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """They say that weights are asked for by an old keyword, and that a default is unusual."""
    for message in ("The parameter 'pretrained'", "Arguments other than a weight enum",
                    "Default ``avg_non_ignore``"):  # fmt: skip
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def draw(features: nn.Sequential) -> nn.Sequential:
    """He-initialised, biases too, so that no tap fades and none forgets its bias."""
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            nn.init.normal_(module.bias, std=0.1)
    return features


def drawn_vgg(cfg: str, batch_norm: bool, *_: object, **__: object) -> SimpleNamespace:
    """In the place of a VGG with pre-trained weights: its features alone."""
    return SimpleNamespace(features=draw(vgg.make_layers(vgg.cfgs[cfg], batch_norm)))


def drawn_weights(enum: _api.WeightsEnum, *_: object, **__: object) -> dict[str, torch.Tensor]:
    """In the place of a download, for the other trunks."""
    if type(enum).__name__ == "ResNet50_Weights":
        return resnet50(weights=None).state_dict()
    makers = {"AlexNet_Weights": alexnet, "SqueezeNet1_1_Weights": squeezenet1_1}
    model = makers[type(enum).__name__](weights=None)
    draw(model.features)
    return model.state_dict()


def drawn_heads(url: str, *_: object, **__: object) -> list[torch.Tensor]:
    """In the place of piq's download."""
    assert url.endswith("lpips_weights.pt"), url
    return [torch.rand(1, channels, 1, 1) for channels in (64, 128, 256, 512, 512)]


vgg._vgg = drawn_vgg
_api.WeightsEnum.get_state_dict = drawn_weights
torch.hub.load_state_dict_from_url = drawn_heads


def package_of_files(name: str, **stubs: dict[str, object]) -> None:
    """Makes submodules of `name` importable from its files, one by one, without what its packages'
    ``__init__`` files import.

    Args:
        stubs: names that its files import from elsewhere, by module ("." as "__").
    """
    for folder in [FILES / name, *(p.parent for p in sorted((FILES / name).rglob("__init__.py")))]:
        dotted = ".".join(folder.relative_to(FILES).parts)
        package = ModuleType(dotted)
        package.__path__ = [str(folder)]
        sys.modules.setdefault(dotted, package)
    for dotted, names in stubs.items():
        module = ModuleType(dotted.replace("__", "."))
        vars(module).update(names)
        sys.modules[module.__name__] = module


@pytest.fixture(scope="session")
def basicsr() -> ModuleType:
    """BasicSR's ``losses/basic_loss.py``."""
    package_of_files("basicsr")
    from basicsr.losses import basic_loss

    return basic_loss


@pytest.fixture(scope="session")
def mmseg() -> ModuleType:
    """mmsegmentation's ``models/losses/cross_entropy_loss.py``; of MMEngine it needs no more than
    a registry to be entered in, and a reader of files with class weights."""
    registry = SimpleNamespace(register_module=lambda: lambda cls: cls)
    package_of_files(
        "mmseg",
        mmengine={},
        mmengine__fileio={"load": None},
        mmseg__registry={"MODELS": registry},
    )
    from mmseg.models.losses import cross_entropy_loss

    return cross_entropy_loss
