"""Memory of one provider at one shape: what a fresh process of its own measures.

Peak: the resident set's high-water mark during one forward and backward, over what was there with
the inputs made (so it includes the gradient, not the logits, the target and the weights). Saved:
bytes that autograd keeps from forward to backward, each storage once, without the same.

    python benchmarks/memory.py gpl_fast-fp32 2,150,512,512 dense --workspace-mb 64
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from providers import NET, PROVIDERS, make_inputs

from gpl_fast.tools import measure


def memory(name: str, shape: tuple[int, ...], kind: str, peaked: bool, net: str) -> dict[str, Any]:
    """``{"peak_mib", "saved_bytes"}`` from a fresh process; None each where it failed."""
    try:
        found: dict[str, Any] = measure.in_fresh_process(_here, name, shape, kind, peaked, net)
    except RuntimeError as error:
        print(f"memory of {name}: {error}", file=sys.stderr)
        return {"peak_mib": None, "saved_bytes": None}
    return found


def _here(
    name: str, shape: tuple[int, ...], kind: str, peaked: bool, net: str, **options: float
) -> dict[str, Any]:
    provider = PROVIDERS[name](shape[1], kind, "cpu", net, **options)
    # Libraries, threads and cached weights are up before the baseline; compiled graphs are for one
    # shape, and the compiler's own memory is not the step's.
    small = shape if name.startswith("compile") else (1, shape[1], 32, 32)
    measure.step(provider, *make_inputs(small, kind, peaked))
    logits, target = make_inputs(shape, kind, peaked)
    peak, saved = measure.memory(provider, logits, target, provider.weights)
    return {"peak_mib": peak, "saved_bytes": saved}


def main() -> None:
    """Measure in this process and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("shape", help="N,C,H,W")
    parser.add_argument("kind", help="of the target")
    parser.add_argument("--peaked", action="store_true")
    parser.add_argument("--workspace-mb", type=float, help="of gpl_fast's providers")
    args = parser.parse_args()
    shape = tuple(map(int, args.shape.split(",")))
    options = {} if args.workspace_mb is None else {"workspace_mb": args.workspace_mb}
    print(json.dumps(_here(args.provider, shape, args.kind, args.peaked, NET, **options)))


if __name__ == "__main__":
    main()
