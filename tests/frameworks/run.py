"""A script as ``python FILE ARGUMENTS`` runs it, where torchvision's compiled operators do not load
beside this torch: ``python tests/frameworks/run.py FILE ARGUMENTS``."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # this checkout's package, and peer_losses
from peer_losses import declare_operators  # noqa: E402

if __name__ == "__main__":
    declare_operators()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
