"""What is known of GPUs: data sheets, measurements by others, and what is assumed for want of one.

A rate changes only beside a measurement that is named here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpl_fast.fast import policy
from gpl_fast.tools.recorder import Launch


@dataclass(frozen=True)
class Rates:
    """Dense bfloat16 TFLOP/s with float32 accumulation, TB/s of memory, and who says so."""

    tflops: float
    tbps: float
    source: str

    def seconds(self, launch: Launch) -> float:
        """The floor of a launch."""
        return max(launch.flops / self.tflops, launch.bytes / self.tbps) / 1e12


# A GPU's peak first, then what has been measured on it.
GPUS: dict[str, tuple[Rates, ...]] = {
    "h200": (
        Rates(989, 4.8, "NVIDIA H200 data sheet, SXM"),
        Rates(790, 4.3, "measured: PyTorch's matmul and copy"),
    ),
    "h100": (Rates(989, 3.35, "NVIDIA H100 data sheet, SXM"),),
    "a100": (Rates(312, 2.039, "NVIDIA A100 80GB data sheet, SXM"),),
    "rtx4090": (Rates(165.2, 1.008, "NVIDIA Ada GPU architecture, appendix A"),),
}


@dataclass(frozen=True)
class Chip:
    """What a prediction goes by.

    Attributes:
        memory_mb: of all of it, in 2^20 bytes.
        sms, hz: and the clock that it keeps under load.
        tensor: FLOPs a clock and SM.
        flops, memory: FLOPs and bytes a second that long kernels reach.
        l2, shared: bytes a clock and SM, from the L2 cache and from shared memory.
        source: of the rates that no data sheet has.
    """

    architecture: str
    memory_mb: float
    sms: int
    hz: float
    tensor: float
    flops: float
    memory: float
    l2: float
    source: str
    shared: float = 128.0

    @property
    def auto_mb(self) -> float:
        """Of ``workspace_mb="auto"``, which grows."""
        return policy.Policy("cuda", memory_mb=self.memory_mb).workspace(None)[0] / policy.MIB

    @property
    def issue(self) -> float:
        """Instructions of a thread a second: four warps a clock and SM."""
        return 4 * 32 * self.sms * self.hz


CHIPS = {
    "h200": Chip(
        "sm_90", 141 * 1024, 132, 1.9e9, 4096, 790e12, 4.3e12, 37,
        "790 TFLOP/s, 4.3 TB/s: PyTorch's matmul and copy; L2 37 B a clock and SM: 9.7 TB/s",
    ),
    "h100": Chip(
        "sm_90", 80 * 1024, 132, 1.9e9, 4096, 790e12, 3.0e12, 37,
        "as h200, but nine tenths of its own memory's rate: assumed",
    ),
    "a100": Chip(
        "sm_80", 80 * 1024, 108, 1.41e9, 2048, 250e12, 1.83e12, 30,
        "four fifths of the peak, nine tenths of the memory's rate, two thirds of the 5120 B a "
        "clock from L2 that NVIDIA's A100 whitepaper names: assumed",
    ),
    "rtx4090": Chip(
        "sm_89", 24 * 1024, 128, 2.52e9, 512, 132e12, 0.91e12, 16,
        "four fifths of the peak, nine tenths of the memory's rate, 5 TB/s from L2: assumed",
    ),
}  # fmt: skip
