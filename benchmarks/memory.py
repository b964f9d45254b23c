"""Memory of one provider at one shape: what a fresh process of its own measures.

Peak: the resident set's high-water mark during one forward and backward, over what was there with
the inputs made (so it includes the gradient, not the logits, the target and the weights). Saved:
bytes that autograd keeps from forward to backward, each storage once, without the same.

    python benchmarks/memory.py gpl_fast-fp32 2,150,512,512 dense --workspace-mb 64
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from providers import PROVIDERS, Provider, make_inputs, target_tensors
from torch import Tensor

from gpl_fast import bench


def measure(name: str, shape: tuple[int, ...], kind: str, *options: str) -> dict[str, Any]:
    """``{"peak_mib", "saved_bytes"}`` from a fresh process; None each where it failed."""
    command = [sys.executable, __file__, name, ",".join(map(str, shape)), kind, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"memory of {name}: the process ended with {done.returncode}", file=sys.stderr)
        return {"peak_mib": None, "saved_bytes": None}
    return json.loads(done.stdout.splitlines()[-1])


def peak_mib(provider: Provider, logits: Tensor, target: Any) -> float | None:
    """MiB that one step adds; None where ``/proc`` does not tell or the mark cannot be reset."""
    if not bench.reset_peak():
        return None
    before = bench.resident_mib("VmRSS")
    kept = bench.step(provider, logits, target)
    after = bench.resident_mib("VmHWM")
    del kept
    return None if before is None or after is None else max(after - before, 0.0)


def saved_bytes(provider: Provider, logits: Tensor, target: Any) -> int:
    """Bytes kept for the backward besides logits, target and weights."""
    kept: dict[int, Tensor] = {}  # holds on to the tensors: no storage's address comes twice

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage()._cdata] = t
        return t

    x = logits.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = provider(x, target)
    for t in (x, *target_tensors(target), *provider.weights()):
        kept.pop(t.untyped_storage()._cdata, None)
    del value
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def main() -> None:
    """Measure in this process and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("shape", help="N,C,H,W")
    parser.add_argument("kind", help="of the target")
    parser.add_argument("--peaked", action="store_true")
    parser.add_argument("--workspace-mb", type=float, help="of gpl_fast's providers")
    args = parser.parse_args()
    n, c, h, w = map(int, args.shape.split(","))
    bound = {} if args.workspace_mb is None else {"workspace_mb": args.workspace_mb}
    provider = PROVIDERS[args.provider](c, args.kind, **bound)
    # Libraries, threads and cached weights are up before the baseline; compiled graphs are for one
    # shape, and the compiler's own memory is not the step's.
    small = (n, c, h, w) if args.provider.startswith("compile") else (1, c, 32, 32)
    bench.step(provider, *make_inputs(small, args.kind, args.peaked))
    logits, target = make_inputs((n, c, h, w), args.kind, args.peaked)
    peak = peak_mib(provider, logits, target)
    saved = saved_bytes(provider, logits, target)
    print(json.dumps({"peak_mib": peak, "saved_bytes": saved}))


if __name__ == "__main__":
    main()
