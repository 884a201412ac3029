"""The tests of OpenAI's and Anthropic's Python clients, of the endpoints that there are.

They were written for a server that answers with made-up data of the right shape, and so ask for
stored objects and pass every field at once. What counts is what comes back: each answer is checked
against the client's own types, in its strict mode too.
"""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

from tests.suites.common import Score, environment, junit, run, served, version

_NEEDED = (
    "pytest",
    "pytest-asyncio",
    "pytest-xdist",
    "respx",
    "dirty-equals",
    "inline-snapshot",
    "http-snapshot",
    "time-machine",
    "nest-asyncio",
    "httpx-aiohttp",
    "rich",
)
_STORED = "asks for what is stored; nothing is stored here"

OPENAI = (
    "test_completions.py",
    "test_embeddings.py",
    "test_models.py",
    "test_responses.py",
    "responses/test_input_tokens.py",
    "chat/test_completions.py",
)
OPENAI_REASONS = {
    r"chat/.*(retrieve|update|list|delete)": _STORED,
    r"test_responses.*(retrieve|delete|cancel)": _STORED,
    r"(previous_response_id|conversation): expected none": _STORED,
    r"test_responses.*compact": "compaction is a service of OpenAI's own model",
    r"test_models.*delete": "a served model cannot be deleted",
    r"logit_bias.*(foo|string)": "a bias for the token 'foo', which is no id",
    r"(input|messages).*Field required": "asks nothing at all",
    r"data.0.embedding Input should be a valid list": "asks for base64, and the strict mode "
    "then says that it is no list",
}
ANTHROPIC = (
    "test_messages.py",
    "test_models.py",
    "beta/test_messages.py",
    "beta/test_models.py",
)
ANTHROPIC_REASONS = {
    "can be enforced, got: schema must be an object": "a strict tool with a text where "
    "its schema must have a schema; calls are held to it here",
}


def openai(scratch: Path) -> Score:
    """The tests of openai-python."""
    with served("gpt-6-astra", "--context", "256") as url:
        return _run("openai", scratch, f"{url}/v1", OPENAI, OPENAI_REASONS)


def anthropic(scratch: Path) -> Score:
    """The tests of anthropic-sdk-python."""
    with served("model_id", "--context", "256") as url:
        return _run("anthropic", scratch, url, ANTHROPIC, ANTHROPIC_REASONS)


def _run(
    package: str, scratch: Path, url: str, files: tuple[str, ...], reasons: dict[str, str]
) -> Score:
    bin_ = environment(scratch, package, *_NEEDED)
    score = Score(f"{package} {version(bin_, package)}")
    source = _source(scratch, bin_, package)
    result = scratch / "result.xml"
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=line", "--show-capture=no"]
    run(
        bin_ / "python",
        *("-m", "pytest", *options, f"--junitxml={result}"),
        *(f"tests/api_resources/{name}" for name in files),
        cwd=source,
        env=os.environ | {"TEST_API_BASE_URL": url},
        expect=(0, 1),
    )
    junit(score, result, "tests.api_resources.", reasons)
    return score


def _source(scratch: Path, bin_: Path, package: str) -> Path:
    """The package's sources with its tests, as PyPI has them."""
    wanted = f"{package}-{version(bin_, package)}"
    folder = scratch / wanted
    if not folder.is_dir():
        options = ["-qq", "--no-deps", "--no-binary", package, "-d", str(scratch)]
        run(bin_ / "pip", "download", *options, wanted.replace("-", "=="))
        with tarfile.open(scratch / f"{wanted}.tar.gz") as archive:
            archive.extractall(scratch, filter="data")
        shutil.rmtree(folder / "src")  # the installed one is tested with
    return folder
