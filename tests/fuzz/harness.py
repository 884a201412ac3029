"""Runs a target on random inputs in a process of its own and watches over it.

Input i of a run is made from ``random.Random(f"{seed} {target} {i}")`` alone, so that a fault is
repeated by naming the three. The process may crash, hang or eat memory: it is then replaced, and
goes on with the next input.
"""

import json
import os
import random
import resource
import select
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
MEMORY = 8 << 30  # bytes of address space; a target that maps more says so in AS_LIMIT
START = 120.0  # seconds in which a process must have started
GROWTH = 1 << 30  # bytes that an input may add to the peak of what is resident, or GROWTH_LIMIT


@dataclass
class Fault:
    """What one input did that it must not."""

    index: int
    kind: str  # exception, crash, hang, memory
    what: str

    def __str__(self) -> str:
        return f"input {self.index}: {self.kind}: {self.what}"


@dataclass
class Result:
    """What came of a run."""

    target: str
    seed: int
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    peak: int = 0  # bytes resident
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"{self.target}: seed {self.seed}, {self.inputs} inputs, {self.peak >> 20} MB at most, "
            f"{len(self.faults)} faults"
        ]
        lines += [f"  {n:7} {outcome}" for outcome, n in self.outcomes.most_common(12)]
        for fault in self.faults[:20]:
            again = f"--seed {self.seed} --first {fault.index} --count 1 --here {self.target}"
            lines += [f"  {fault}", f"    again: python -m tests.fuzz {again}"]
        return "\n".join(lines)


def run(
    target: str,
    seed: int,
    count: int,
    *,
    first: int = 0,
    seconds: float = 1e9,
    patience: float = 20.0,
    unlimited: bool = False,
) -> Result:
    """Give a target ``count`` inputs, or as many as ``seconds`` allow; ``patience`` for each.

    The time is the inputs': that in which processes start does not count. ``unlimited`` bounds no
    address space, of which sanitizers take terabytes.
    """
    result, index = Result(target, seed), first
    while index < first + count and result.seconds < seconds:
        index = _process(result, index, first + count, seconds, patience, unlimited)
    return result


def _process(
    result: Result, index: int, end: int, seconds: float, patience: float, unlimited: bool
) -> int:
    """Run one process until it ends, and return the input to go on with."""
    command = [sys.executable, "-m", "tests.fuzz", "--worker", result.target]
    command += ["--seed", str(result.seed), "--first", str(index), "--count", str(end - index)]
    command += ["--unlimited"] if unlimited else []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, bufsize=0
    )
    assert process.stdout is not None
    lines, rest, began = process.stdout, b"", False
    try:
        while True:
            left = max(seconds - result.seconds, 0) if result.inputs else patience  # one at least
            start = time.monotonic()
            ready, _, _ = select.select([lines], [], [], min(patience, left) if began else START)
            result.seconds += time.monotonic() - start if began else 0
            if not ready:
                if began and result.inputs and result.seconds >= seconds:
                    return end
                result.faults.append(Fault(index, "hang", f"longer than {patience:g} s"))
                return index + 1
            data = os.read(lines.fileno(), 1 << 16)
            if not data:
                code = process.wait()
                if code == 0:
                    return end
                kind = "crash" if began else "does not start"
                result.faults.append(Fault(index, kind, f"exit {code}"))
                return index + 1 if began else end
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                began = True
                index = _take(result, json.loads(line))
    finally:
        process.kill()
        process.wait()


def _take(result: Result, event: dict[str, object]) -> int:
    """Note what a worker says of an input, and return the next."""
    index = int(str(event["index"]))
    if "fault" in event:
        result.faults.append(Fault(index, str(event["kind"]), str(event["fault"])))
    elif "outcome" in event:
        result.outcomes[str(event["outcome"])] += 1
    else:
        return index  # it is ready
    result.inputs += 1
    result.peak = max(result.peak, int(str(event["peak"])))
    return index + 1


def work(target: str, seed: int, first: int, count: int, unlimited: bool) -> None:
    """The other side: give inputs, and say in a line what came of each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)

    def say(index: int, **event: object) -> None:
        out.write(json.dumps({"index": index, "peak": peak, **event}) + "\n")
        out.flush()

    module = import_module(f"tests.fuzz.targets.{target}")
    if not unlimited:
        limit = getattr(module, "AS_LIMIT", MEMORY)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    peak = peak_resident()
    say(first)
    for index in range(first, first + count):
        before = peak
        try:
            outcome = one(module, seed, index)
        except BaseException as error:
            peak = peak_resident()
            say(index, kind="exception", fault=_short(error))
            continue
        peak = peak_resident()
        if peak - before > getattr(module, "GROWTH_LIMIT", GROWTH):
            say(index, kind="memory", fault=f"{(peak - before) >> 20} MB more")
        else:
            say(index, outcome=outcome)


def one(module: object, seed: int, index: int) -> str:
    """What came of one input; raises whatever is a fault."""
    from isobit.errors import IsobitError  # noqa: PLC0415 - a worker imports after it is watched

    target = module.__name__.rpartition(".")[2]  # type: ignore[attr-defined]
    try:
        return str(module.one(random.Random(f"{seed} {target} {index}")))  # type: ignore[attr-defined]
    except IsobitError as error:
        line = str(error)
        assert len(line) < 1000 and "\n" not in line, f"a refusal of {len(line)} characters"
        return f"refused: {type(error).__name__}"


def peak_resident() -> int:
    """Most bytes that were resident; getrusage begins with what the parent had."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024


def _short(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "isobit" in f.filename] or list(frames)
    where = f"{Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else "?"
    return f"{type(error).__name__} at {where}: {str(error)[:200]!r}"
