"""The CUDA side of csrc/ops.cpp as operators of CPU tensors.

The source is compiled with CPU tensors in the place of CUDA's, no stream, and another name, so both
libraries can be loaded; the kernels are the shipped ones, run on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import emulate
import torch

CHANGES = {
    "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU,": "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, XLA,",
    "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CUDA,": "STABLE_TORCH_LIBRARY_IMPL(gpl_fast, CPU,",
    "LIBRARY(gpl_fast, m)": "LIBRARY(gpl_fast_emulated, m)",
    "LIBRARY_IMPL(gpl_fast,": "LIBRARY_IMPL(gpl_fast_emulated,",
    "(t).is_cuda() ?": "true ?",
    "  const torch::stable::accelerator::DeviceGuard guard(device);\n": "",
    "aoti_torch_get_current_cuda_stream(device, &stream)": "(device, AOTI_TORCH_SUCCESS)",
}


def load(folder: Path) -> Any:
    """torch.ops.gpl_fast_emulated, built in `folder` once a process."""
    if hasattr(torch.ops.gpl_fast_emulated, "cuda_build"):
        return torch.ops.gpl_fast_emulated
    text = (emulate.CSRC / "ops.cpp").read_text()
    for old, new in CHANGES.items():
        assert old in text, old
        text = text.replace(old, new)
    (folder / "ops.cpp").write_text(text)
    torch_dir = Path(torch.__file__).parent
    flags = ("-O1", f"-I{emulate.CSRC}", f"-isystem{torch_dir / 'include'}",
             "-DTORCH_TARGET_VERSION=0x020b000000000000", '-DGPL_FAST_CUDA="none"')  # fmt: skip
    sources = (folder / "ops.cpp", emulate.HERE / "stages_on_cpu.cpp")
    objects = emulate.kernels((*emulate.CONVOLUTIONS, *emulate.ELEMENTWISE))
    objects += [emulate.compiled(source, flags) for source in sources]
    linked = (f"-L{torch_dir / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu")
    library = emulate.link(objects, folder / "libgpl_fast_emulated.so", *linked)
    torch.ops.load_library(str(library))
    return torch.ops.gpl_fast_emulated
