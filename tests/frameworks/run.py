"""A script as ``python FILE ARGUMENTS`` runs it, where torchvision's compiled operators do not load
beside this torch: ``python tests/frameworks/run.py FILE ARGUMENTS``."""

import runpy
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this checkout's package, and peer_losses
from peer_losses import declare_operators  # noqa: E402


class _Anything(ModuleType):
    """mmcv's compiled operators, which mmcv-lite has not and mmsegmentation's heads import; none of
    them is called."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def stand_ins() -> None:
    """For what frameworks import and does not load here; before their import."""
    declare_operators()
    extension = sys.modules["mmcv._ext"] = _Anything("mmcv._ext")
    extension.__spec__ = ModuleSpec("mmcv._ext", loader=None)


if __name__ == "__main__":
    stand_ins()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    # A process that exits with its group alive may be aborted by the group's threads.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
