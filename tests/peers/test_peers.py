"""What the other tests of this folder rely on: which packages they compare with."""

from __future__ import annotations

import re
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import lpips
import pytest
import torch

FILES = Path(sys.prefix) / "peers"
ROOT = Path(__file__).resolve().parents[2]
PINS = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))


@pytest.mark.parametrize("name", ["lpips", "piq", "torchmetrics", "monai", "torchvision", "torch"])
def test_the_installed_packages_are_those_that_are_pinned(name):
    assert version(name).partition("+")[0] == PINS[name]


def test_so_are_those_whose_files_alone_are_used(basicsr, mmseg):
    found = {of.metadata["Name"]: of.version for of in distributions(path=[str(FILES)])}
    assert found == {name: PINS[name] for name in ("basicsr", "mmsegmentation")}
    for module in (basicsr, mmseg):
        assert Path(module.__file__).is_relative_to(FILES)


def test_trunks_differ_and_heads_are_the_package_s_own():
    first, second = (lpips.LPIPS(net="vgg", verbose=False) for _ in range(2))
    assert torch.equal(first.lin0.model[1].weight, second.lin0.model[1].weight)
    assert not torch.equal(first.net.slice1[0].weight, second.net.slice1[0].weight)
