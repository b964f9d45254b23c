"""Commands in bounded time, for a report that is on disk whenever it is cut off.

A step is a few commands beside one another, each in a session of its own, so that it is killed with
all that it has started. While they run the report is written again and again.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_BYTES = 1 << 18  # of a command, its end
POLL, WRITE = 0.05, 2.0  # seconds
GRACE = 2.0  # for a killed process to be gone, and for the last page to be written
FINE = (0, 5)  # pytest's 5: no test of a file was chosen


def _lived() -> float:
    """Seconds that this process has lived; 0 where the system does not tell, or what cannot be."""
    try:
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        lived = time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return lived if 0.0 <= lived <= 60.0 else 0.0


BORN = time.monotonic() - _lived()


@dataclass
class Step:
    """What became of a step: "ok", "failed", "timed out" or "skipped", and why; `cases`: of each of
    its commands."""

    name: str
    status: str = "running"
    seconds: float = 0.0
    detail: str = ""
    cases: dict[str, str] = field(default_factory=dict)


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    log: Path


class Steps:
    """Runs steps until `seconds` have passed since it was made.

    Args:
        write: makes the report of what there is; called in the middle of steps too, and by a
            thread of its own at the end, should a step not come back.
        environment: of the commands.
    """

    def __init__(
        self, seconds: float, write: Callable[[], None], root: Path, environment: dict[str, str]
    ) -> None:
        self.end, self.write = time.monotonic() + seconds, write
        self.root, self.environment = root, environment
        self.scratch = Path(tempfile.mkdtemp(prefix="report-"))
        self.done: list[Step] = []
        self.logs: list[Path] = []
        self._children: dict[str, _Child] = {}
        self._lock = threading.Lock()
        self._watch = threading.Timer(seconds + GRACE, self._too_late)
        self._watch.daemon = True
        self._watch.start()

    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def output(self, name: str, case: str = "") -> Path:
        """Where a command may put its JSON."""
        return self.scratch / f"{name}-{case}.json"

    def run(
        self, name: str, commands: Mapping[str, list[str]], limit: float, at_once: int = 1,
        **more: str,
    ) -> Step:  # fmt: skip
        """The commands, so many at once, for `limit` seconds in all; `more`: of the environment."""
        begin = time.monotonic()
        if (end := min(begin + limit, self.end)) <= begin:
            return self.skip(name, "no time was left")
        step = Step(name)
        self.done.append(step)
        waiting, written = list(commands), begin
        while (waiting or self._children) and time.monotonic() < end:
            while waiting and len(self._children) < at_once:
                case = waiting.pop(0)
                self._start(name, case, commands[case], more)
            time.sleep(POLL)
            for case, child in list(self._children.items()):
                if (code := child.process.poll()) is not None:
                    step.cases[case] = "ok" if code in FINE else "failed"
                    self._kill(case)  # what it has left running
            step.seconds = time.monotonic() - begin
            if time.monotonic() > written + WRITE:
                self.report()
                written = time.monotonic()
        step.cases |= dict.fromkeys((*self._children, *waiting), "timed out")
        self.kill()
        step.detail = step.detail or self._last_words(name, step)
        found = set(step.cases.values())
        step.status = next((s for s in ("timed out", "failed") if s in found), "ok")
        step.seconds = time.monotonic() - begin
        return self._say(step)

    def skip(self, name: str, why: str) -> Step:
        """A step that cannot run here."""
        self.done.append(Step(name, "skipped", 0.0, why))
        return self._say(self.done[-1])

    def kill(self) -> None:
        """What still runs, whatever it does with signals."""
        self._kill(*self._children)

    def report(self) -> None:
        """Write it, by one thread at a time."""
        with self._lock:
            self.write()

    def close(self) -> None:
        """Nothing is left to come."""
        self.kill()
        self._watch.cancel()

    def log(self) -> str:
        """The ends of what all commands have said."""
        parts = []
        for path in self.logs:
            with path.open("rb") as f:
                f.seek(max(0, path.stat().st_size - LOG_BYTES))
                parts.append(f"==== {path.stem}\n{f.read().decode(errors='replace')}\n")
        return "".join(parts)

    def _start(self, name: str, case: str, command: list[str], more: dict[str, str]) -> None:
        log = self.scratch / f"{name}-{case}.log"
        self.logs.append(log)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, cwd=self.root, env=self.environment | more, stdin=subprocess.DEVNULL,
                stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._children[case] = _Child(process, log)

    def _kill(self, *cases: str) -> None:
        """All of them, then one grace for all to be gone."""
        found = [self._children.pop(case, None) for case in cases]
        processes = [child.process for child in found if child]  # None: the other thread was here
        for process in processes:
            with suppress(ProcessLookupError):  # it has left nothing
                os.killpg(process.pid, signal.SIGKILL)
        end = time.monotonic() + GRACE
        for process in processes:
            with suppress(subprocess.TimeoutExpired):  # a driver holds it: it ends when that does
                process.wait(max(0.0, end - time.monotonic()))

    def _last_words(self, name: str, step: Step) -> str:
        """Of the only command, or which ones went wrong."""
        bad = [case for case, status in step.cases.items() if status != "ok"]
        if len(step.cases) > 1:
            return f"{len(step.cases) - len(bad)} of {len(step.cases)} ok" + (
                f"; not: {', '.join(bad)}" if bad else ""
            )
        log = self.scratch / f"{name}-{next(iter(step.cases), '')}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        return lines[-1][:300] if lines else ""

    def _say(self, step: Step) -> Step:
        print(f"{step.name:<11} {step.status:<9} {step.seconds:6.1f}s  {step.detail}", flush=True)
        self.report()
        return step

    def _too_late(self) -> None:
        """The main thread has not come back: what there is has to do."""
        self.kill()
        if self._lock.acquire(timeout=GRACE):  # else the page is being written now
            self.write()
        os._exit(3)


def outcomes(logs: Iterable[str]) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, by pytest's lines, and the names of those
    that failed."""
    words = {"PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
    counts: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0, "names": []}
    for text in logs:
        for name, word in re.findall(rf"^(\S+::.+?) ({'|'.join(words)})\b", text, re.M):
            counts[words[word]] += 1
            counts["names"] += [name] * (words[word] == "failed")
    return counts
