"""llama.cpp's tools/server/tests against a server of the sample.

They start llama-server themselves, with the options that a test asks for, and many look for words
that its own tiny models say. Here a plugin (:mod:`tests.suites.llama_plugin`) starts isobit in its
place: a test that asks for an option that isobit has not does not apply.
"""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

from tests.suites.common import Score, environment, junit, run

_NEEDED = ("pytest", "openai", "anthropic", "requests", "filelock", "wget", "numpy", "aiohttp")
_FILES = (
    "test_basic.py",
    "test_chat_completion.py",
    "test_compat_anthropic.py",
    "test_compat_oai_responses.py",
    "test_completion.py",
    "test_embedding.py",
    "test_security.py",
    "test_stream.py",
    "test_template.py",
    "test_tokenize.py",
    "test_tool_call.py",
)
"""The other files each test one thing that only llama-server has: slots, LoRA, a router, …"""

REASONS: dict[str, str] = {}


def run_suite(scratch: Path) -> Score:
    """Those of its files that test an interface of OpenAI's or Anthropic's."""
    bin_ = environment(scratch, *_NEEDED)
    source = _source(scratch, bin_)
    score = Score(f"llama.cpp's server tests, as {source.parents[3].name} has them")
    result = scratch / "result.xml"
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-p", "tests.suites.llama_plugin"]
    root = Path(__file__).parents[2]
    run(
        bin_ / "python",
        *("-m", "pytest", *options, f"--junitxml={result}"),
        *(f"unit/{name}" for name in _FILES),
        cwd=source,
        env=os.environ | {"PYTHONPATH": f"{root}:{source}", "ISOBIT_PYTHON": sys.executable},
        expect=(0, 1),
    )
    junit(score, result, "unit.", REASONS, skips=True)
    return score


def _source(scratch: Path, bin_: Path) -> Path:
    """The tests as llama-cpp-python's sources on PyPI carry them."""
    inside = "vendor/llama.cpp/tools/server/tests"
    if not (found := list(scratch.glob(f"llama_cpp_python-*/{inside}"))):
        options = ["-qq", "--no-deps", "--no-binary", ":all:", "-d", str(scratch)]
        run(bin_ / "pip", "download", *options, "llama-cpp-python")
        [file] = scratch.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(file) as archive:
            members = [m for m in archive.getmembers() if f"/{inside}/" in m.name]
            archive.extractall(scratch, members, filter="data")
        found = list(scratch.glob(f"llama_cpp_python-*/{inside}"))
    return found[0]
