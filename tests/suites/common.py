"""What the suites share: a server, an environment for each, a score."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import urllib.request
import venv
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Score:
    """How a suite went."""

    version: str
    passed: int = 0
    not_applicable: Counter[str] = field(default_factory=Counter)
    """Reason -> how many."""
    failed: list[str] = field(default_factory=list)

    def file(self, name: str, error: str, reasons: Mapping[str, str]) -> None:
        """Sort a failure in; reasons: a pattern for "name: error" -> why that does not apply."""
        said = f"{name}: {error}"
        reason = next((why for pattern, why in reasons.items() if re.search(pattern, said)), None)
        if reason is None:
            self.failed.append(said)
        else:
            self.not_applicable[reason] += 1

    def __str__(self) -> str:
        lines = [
            f"{self.version}: {self.passed} passed, {self.not_applicable.total()} do not apply, "
            f"{len(self.failed)} failed"
        ]
        lines += [f"  does not apply, {n}: {why}" for why, n in self.not_applicable.most_common()]
        return "\n".join([*lines, *(f"  failed: {said}" for said in self.failed)])


def junit(
    score: Score, result: Path, within: str, reasons: Mapping[str, str], *, skips: bool = False
) -> None:
    """Add what pytest's JUnit file says.

    within: what the names of its modules begin with. skips: a test that is skipped does not apply,
    for the reason that it gives; else it does not count.
    """
    for case in ET.parse(result).iter("testcase"):
        place = (case.get("classname") or "").removeprefix(within)
        name = f"{place.replace('chat.test', 'chat/test')}.{case.get('name')}"
        failures = [e for e in case if e.tag in ("failure", "error")]
        skipped = [e for e in case if e.tag == "skipped"]
        if failures:
            said = f"{failures[0].get('message') or ''} {(failures[0].text or '')[-400:]}"
            score.file(name, " ".join(said.split())[-700:], reasons)
        elif not skipped:
            score.passed += 1
        elif skips:
            score.not_applicable[skipped[0].get("message") or "skipped"] += 1


@contextmanager
def served(name: str, *options: str) -> Iterator[str]:
    """A server of the sample in a process of its own; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "isobit", "serve", "--backend", "cpu", "--threads", "1"]
    command += ["--port", str(port), "--name", name, *options]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as process:
        try:
            while True:
                try:
                    with urllib.request.urlopen(f"{url}/ready", timeout=5):
                        break
                except OSError:
                    if process.poll() is not None:
                        raise
                    time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def environment(scratch: Path, *packages: str) -> Path:
    """The ``bin`` of an environment that has these packages."""
    bin_ = scratch / "venv" / "bin"
    if not bin_.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        venv.create(scratch / "venv", with_pip=True)
    run(bin_ / "pip", "install", "-qq", "--disable-pip-version-check", *packages)
    return bin_


def run(
    program: Path | str,
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    expect: Sequence[int] = (0,),
) -> str:
    """The standard output of a program. Raises CalledProcessError for an unexpected exit code."""
    command = [str(program), *arguments]
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in expect:
        print(done.stdout)
        raise subprocess.CalledProcessError(done.returncode, command)
    return done.stdout


def version(bin_: Path, package: str) -> str:
    """The version of a package that an environment has."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return run(bin_ / "python", "-c", code).strip()
