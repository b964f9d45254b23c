"""What makes a wgmma read something else than it should, found by walking the compiled code; and
what makes it wait.

A walk goes along every path from the first instruction and carries a state; it ends where a state
has been seen at that instruction before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


@dataclass
class Instruction:
    """One line of SASS or PTX, without its guard; `following`: places where it may go on."""

    text: str
    guarded: bool
    following: list[int] = field(default_factory=list)

    @property
    def opcode(self) -> str:
        return self.text.split(None, 1)[0].rstrip(";")


def walk(
    code: Sequence[Instruction],
    start: State,
    step: Callable[[Instruction, State], tuple[State, bool]],
) -> list[str]:
    """Texts at which `step` finds a fault, in order; it returns (state afterwards, fault)."""
    seen: set[tuple[int, State]] = set()
    faults: set[int] = set()
    ahead = [(0, start)] if code else []
    while ahead:
        at, state = ahead.pop()
        if (at, state) in seen:
            continue
        seen.add((at, state))
        after, fault = step(code[at], state)
        if fault:
            faults.add(at)
        ahead += [(to, after) for to in code[at].following if to < len(code)]
    return [code[at].text for at in sorted(faults)]


# ------------------------------------------------------------------------------------------- SASS

# In flight: A registers since the last commit, then those of each group, oldest first.
Flight = tuple[frozenset[int], ...]
MOST_GROUPS = 8

PREDICATE = r"!?U?P(?:T|\d+)$"
# Their first register is not what they write.
WRITES_NONE = ("BAR", "BRX", "JMX", "CALL", "RET", "WARPSYNC", "NANOSLEEP", "SYNCS", "FCHK", "R2P")
PAIR = r"\.64\b|\.WIDE\b|^D(?:ADD|MUL|FMA)|\.MT?88\.2|^CS2R$|[SU]64\b|\.F64\b"
QUAD = r"\.128\b|\.MT?88\.4|^HMMA\b"


def overwritten(sass: str) -> list[str]:
    """Instructions that write a register which a wgmma in flight reads as its A operand.

    `sass` is one function as cuobjdump prints it. Undefined by the PTX manual before the
    ``wgmma.wait_group`` that covers the product.
    """
    code = parse_sass(sass)
    if not any(i.opcode.startswith("HGMMA") for i in code):
        return []

    def step(i: Instruction, flight: Flight) -> tuple[Flight, bool]:
        if i.opcode.startswith("HGMMA"):
            a = re.match(r"\S+ R\d+, R(\d+)\b", i.text)
            registers = frozenset(range(int(a[1]), int(a[1]) + 4)) if a else frozenset()
            flight = (flight[0] | registers, *flight[1:])
            return (committed(flight) if "gsb0" in i.text else flight), False
        if wait := re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, (\w+)", i.text):
            left = int(wait[1], 16)
            groups = flight[1:]
            return (flight[0], *groups[max(0, len(groups) - left) :]), False
        return flight, any(written(i.text) & group for group in flight)

    return walk(code, (frozenset(),), step)


def from_registers(sass: str) -> list[str]:
    """wgmmas whose A operand is a range of registers."""
    return re.findall(r"HGMMA\S* R\d+, R\d+[^;]*", sass)


def between_waits(sass: str) -> list[int]:
    """How many wgmmas there are from one wait to the next, in the order of the code; no zeros."""
    runs = [0]
    for found in re.findall(r"\b(?:HGMMA\.|WARPGROUP\.DEPBAR)", sass):
        if found == "HGMMA.":
            runs[-1] += 1
        elif runs[-1]:
            runs.append(0)
    return [run for run in runs if run]


def committed(flight: Flight) -> Flight:
    """With a new group; the oldest of many are taken as one, so that a loop comes to an end."""
    now, *groups = flight
    if len(groups) == MOST_GROUPS:
        groups[:2] = [groups[0] | groups[1]]
    return (frozenset(), *groups, now)


def written(text: str) -> set[int]:
    """The registers that an instruction writes."""
    opcode, _, rest = text.rstrip("; ").partition(" ")
    operands = [operand.strip() for operand in rest.split(",")]
    if opcode.startswith(WRITES_NONE) or "SETP" in opcode:
        return set()
    while operands and re.match(PREDICATE, operands[0]):
        operands.pop(0)
    first = re.match(r"R(\d+)$", operands[0]) if operands else None
    if first is None:
        return set()
    wide = 4 if re.search(QUAD, opcode) else 2 if re.search(PAIR, opcode) else 1
    return set(range(int(first[1]), int(first[1]) + wide))


def parse_sass(sass: str) -> list[Instruction]:
    """Of one function."""
    lines = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.M)
    place = {int(address, 16): at for at, (address, _) in enumerate(lines)}
    code = []
    reconverge: dict[str, int] = {}
    for at, (_, text) in enumerate(lines):
        guard, body = re.match(r"(@!?U?P\w+)?\s*(.*)", text).groups()  # type: ignore[union-attr]
        body = body.strip()
        i = Instruction(body, guard is not None, [at + 1])
        target = re.search(r"\b0x([0-9a-f]+)$", body)
        if i.opcode.startswith(("BRA", "CALL")):
            assert target, f"where does it go? {body}"
            i.following = [place[int(target[1], 16)]]
            i.following += [at + 1] if guard or "," in body or i.opcode.startswith("CALL") else []
        elif i.opcode.startswith("BSSY") and target:
            reconverge[body.split()[1].rstrip(",")] = place[int(target[1], 16)]
        elif i.opcode.startswith("BSYNC"):
            i.following.append(reconverge[body.split()[1]])
        elif i.opcode.startswith(("EXIT", "RET")):
            i.following = [at + 1] if guard else []
        code.append(i)
    return code


# -------------------------------------------------------------------------------------------- PTX


@dataclass(frozen=True)
class Copies:
    """Writes of the generic proxy into shared memory, as one thread has to account for them."""

    open: bool = False  # cp.async since the last commit
    groups: int = 0  # committed, not waited for
    landed: bool = False  # there, and no proxy fence since


def unfenced(ptx: str) -> list[str]:
    """Products that read shared memory which ``cp.async`` or ``st.shared`` wrote, without a
    ``fence.proxy.async`` in between.

    Those two write by the generic proxy; wgmma and tcgen05.mma read by the async one.
    """

    def step(i: Instruction, state: Copies) -> tuple[Copies, bool]:
        op = i.opcode
        if re.match(r"cp\.async\.c[ag]\.", op):
            return Copies(True, state.groups, state.landed), False
        if op.startswith("cp.async.commit_group"):
            return Copies(False, min(state.groups + 1, 64), state.landed), False
        if op.startswith(("cp.async.wait_group", "cp.async.wait_all")) and not i.guarded:
            left = int(i.text.split()[1].rstrip(";")) if "group" in op else 0
            landed = state.landed or state.groups > left or ("all" in op and state.open)
            still_open = state.open and "all" not in op
            return Copies(still_open, min(state.groups, left), landed), False
        if op.startswith(("st.shared", "stmatrix")):
            return Copies(state.open, state.groups, True), False
        if op.startswith("fence.proxy.async") and "tensormap" not in op and not i.guarded:
            return Copies(state.open, state.groups, False), False
        return state, op.startswith(("wgmma.mma_async", "tcgen05.mma")) and state.landed

    return walk(parse_ptx(ptx), Copies(), step)


def parse_ptx(ptx: str) -> list[Instruction]:
    """Of the one function of a module, as LLVM prints it: labels and braces on their own lines."""
    scopes = [0]  # those that are open; a label is known in its own
    opened = 0
    labels: dict[tuple[int, str], int] = {}
    jumps: list[tuple[Instruction, str, tuple[int, ...]]] = []
    code: list[Instruction] = []
    for line in re.sub(r"//.*", "", ptx[ptx.index(".entry") :]).splitlines():
        if line.strip() == "{":
            opened += 1
            scopes.append(opened)
        elif line.strip() == "}":
            scopes.pop()
        elif label := re.match(r"\s*([\w.$]+):(?!:)", line):
            labels[scopes[-1], label[1]] = len(code)
        else:
            for statement in line.split(";"):
                guard, body = re.match(r"\s*(@\S+\s+)?(.*)", statement).groups()  # type: ignore[union-attr]
                if not re.match("[a-z]", body):
                    continue  # a directive, or nothing
                i = Instruction(body.strip(), guard is not None, [len(code) + 1])
                if i.opcode.startswith(("bra", "ret", "exit")):
                    i.following = i.following if guard else []
                if i.opcode.startswith("bra"):
                    jumps.append((i, body.split()[1], tuple(scopes)))
                code.append(i)
    for i, to, known in jumps:
        i.following.append(next(labels[s, to] for s in reversed(known) if (s, to) in labels))
    return code
