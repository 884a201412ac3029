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
    "test_tool_call.py",
)
"""The other files each test one thing that only llama-server has: slots, LoRA, a router, …"""

_WORDS = "looks for the words or counts the tokens of its own model"
_FIELDS = "looks for what only llama-server writes: build number, timings, progress, its error type"
REASONS = {
    r"startswith of str|is not None and False|__verbose|exceed_context_size": _FIELDS,
    r"timings|telemetry|return_progress|'too large'": _FIELDS,
    r"match_regex|cached_tokens|embedding_usage": _WORDS,
    r"(stream.*|per_token.*) is None": "wants a first piece with null content",
    r"req\[messages7\]": "wants two answers in a row refused",
    r"logit_bias": "names tokens by their text in logit_bias, or in a list",
    r"with_image|vision": "wants a 500 for pictures, or a model that sees",
    r"empty_messages": "wants an answer to no message",
    r"mixed_input|tokens_input|same_as_string": "mixes texts and ids in one list",
    r"pooling": "wants embeddings pooled otherwise, or not",
    r"public_endpoint|static_assets": "wants /health and files of its own page without a key",
    r"cors_options": "lets pages of any origin in unless told otherwise",
    r"'POST /chat/completions'": "has OpenAI's client ask without /v1",
    r"NoneType": "asks a route or a form of llama-server's own",
}


def run_suite(scratch: Path) -> Score:
    """Those of its files that test an interface of OpenAI's or Anthropic's."""
    bin_ = environment(scratch, *_NEEDED)
    source = _source(scratch, bin_)
    score = Score(f"llama.cpp's server tests, as {source.parents[4].name} has them")
    result = scratch / "result.xml"
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", "-p", "tests.suites.llama_plugin"]
    options += ["-m", "not slow"]  # those want models of billions of parameters
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
