"""A pytest plugin that starts isobit where llama.cpp's tests start llama-server."""

from __future__ import annotations

import os
import subprocess
import time
import urllib.request
from typing import Any

import pytest

_OPTIONS = {  # of ServerProcess, and what they are here
    "n_ctx": "--context",
    "n_slots": "--sequences",
    "model_alias": "--name",
}
_HAS = {"api_key", "no_ui", "server_port", "server_host", *_OPTIONS}
# How llama-server would go about it; no answer depends on these here.
_NO_MATTER = {
    *("model_hf_repo", "model_hf_file", "offline", "n_threads", "n_batch", "n_ubatch", "fa"),
    *("kv_unified", "server_continuous_batching", "server_embeddings", "server_metrics", "debug"),
    *("temperature", "seed", "n_predict", "jinja", "n_gpu_layer", "cache_ram", "external_server"),
    *("cache_prompt", "pooling", "n_prompts", "log_path", "server_slots"),
}
_ALIASES = ("/chat/completions", "/models", "/responses")  # OpenAI's, there without /v1 as well
_ROUTES = ("/v1/completions", "/v1/embeddings", "/v1/messages", "/health", "/")


def pytest_sessionstart(session: pytest.Session) -> None:
    """Put isobit in llama-server's place."""
    import utils  # type: ignore[import-not-found]  # noqa: PLC0415 - of the tests

    utils.ServerPreset.load_all = staticmethod(lambda: None)
    utils.ServerProcess.start = _start
    make = utils.ServerProcess.make_url
    utils.ServerProcess.make_url = lambda self, path, host=None: make(self, _path(path), host)


def _path(path: str) -> str:
    """Where it is here; a test of any other route does not apply."""
    if path in _ALIASES:
        return f"/v1{path}"
    if path in _ROUTES or path.startswith(tuple(f"/v1{alias}" for alias in _ALIASES)):
        return path
    if path.startswith("/v1/messages/"):
        return path
    pytest.skip("asks a route or a form of llama-server's own")


def _start(self: Any, timeout_seconds: float = 60) -> None:
    import utils  # noqa: PLC0415

    plain = utils.ServerProcess()
    for name in vars(self):
        set_ = getattr(self, name) not in (None, False, getattr(plain, name, None))
        if set_ and name not in _HAS | _NO_MATTER and name not in ("process", "ready"):
            pytest.skip(f"starts llama-server with an option of its own ({name})")
    if "," in self.server_host:
        pytest.skip("listens at two addresses at once")
    command = [os.environ["ISOBIT_PYTHON"], "-m", "isobit", "serve", "--backend", "cpu"]
    command += ["--threads", "1"]
    command += ["--port", str(self.server_port), "--host", self.server_host]
    for name, option in _OPTIONS.items():
        value = getattr(self, name)
        command += [option, str(value)] if value else []
    command += ["--no-page"] if self.no_ui else []
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if self.api_key:
        command += ["--api-key-env", "LLAMA_KEY"]
        env["LLAMA_KEY"] = self.api_key
    self.process = subprocess.Popen(command, env=env)
    utils.server_instances.add(self)
    url = f"http://{self.server_host}:{self.server_port}/ready"
    headers = {"authorization": f"Bearer {self.api_key}"}
    request = urllib.request.Request(url, headers=headers)
    end = time.monotonic() + timeout_seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            if self.process.poll() is not None:
                raise
            time.sleep(0.05)
    raise TimeoutError
