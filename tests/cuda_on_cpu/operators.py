"""The CUDA side of csrc/operators as operators of CPU tensors.

The sources are compiled with CPU tensors in the place of CUDA's, no stream, and another name, so
both libraries can be loaded; the kernels are the shipped ones, run on the CPU.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import emulate
import torch

CHANGES = {
    "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU,": "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, XLA,",
    "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA,": "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU,",
    "LIBRARY_FRAGMENT(gpl_fast, m)": "LIBRARY_FRAGMENT(gpl_fast_emulated, m)",
    "LIBRARY_IMPL(gpl_fast,": "LIBRARY_IMPL(gpl_fast_emulated,",
    "(t).is_cuda() ?": "true ?",
    "  const torch::stable::accelerator::DeviceGuard guard(device);\n": "",
    "aoti_torch_get_current_cuda_stream(device, &stream)": "(device, AOTI_TORCH_SUCCESS)",
}


def load(folder: Path) -> Any:
    """torch.ops.gpl_fast_emulated, built in `folder` once a process."""
    if hasattr(torch.ops.gpl_fast_emulated, "cuda_build"):
        return torch.ops.gpl_fast_emulated
    shutil.copytree(emulate.CSRC, folder / "csrc")
    sources, unused = [emulate.HERE / "stages_on_cpu.cpp"], set(CHANGES)
    for source in sorted((folder / "csrc" / "operators").iterdir()):
        text = source.read_text()
        if source.suffix == ".cpp" and "GPL_FAST_CUDA" in text:
            sources.append(source)
        for old, new in CHANGES.items():
            unused -= {old} if old in text else set()
            text = text.replace(old, new)
        source.write_text(text)
    assert not unused, unused
    torch_dir = Path(torch.__file__).parent
    flags = ("-O1", f"-isystem{torch_dir / 'include'}",
             "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DGPL_FAST_CUDA="none"')  # fmt: skip
    objects = emulate.kernels((*emulate.CONVOLUTIONS, *emulate.ELEMENTWISE))
    objects += emulate.side_by_side(sources, flags)
    linked = (f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu")
    library = emulate.link(objects, folder / "libgpl_fast_emulated.so", *linked)
    torch.ops.load_library(str(library))
    return torch.ops.gpl_fast_emulated
