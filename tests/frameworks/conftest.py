"""The recipes of examples/ by the real frameworks; models are small and random, nothing is
downloaded."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
from run import stand_ins

NEEDED = (
    "lightning", "jsonargparse", "transformers", "accelerate", "segmentation_models_pytorch",
    "monai", "mmengine", "mmcv", "mmseg", "hydra", "skimage", "torchvision",
)  # fmt: skip
if missing := [name for name in NEEDED if find_spec(name) is None]:
    raise pytest.UsageError(
        f"tests/frameworks: {', '.join(missing)} missing; `make test-frameworks` installs them"
    )

# What a framework would ask a server for is an error here at once.
os.environ |= {"HF_HUB_OFFLINE": "1", "NO_ALBUMENTATIONS_UPDATE": "1"}
stand_ins()
