"""What Ollama keeps: its manifests name blobs, and the blob of a model is a GGUF file."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from isobit.errors import ModelRefused, UsageError

SCHEME = "ollama://"

_MANIFEST_LIMIT = 1 << 20  # bytes
_MODEL_LAYER = "application/vnd.ollama.image.model"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*){0,2}(:[\w.-]+)?", re.ASCII)


def folder() -> Path:
    """Where Ollama keeps its models."""
    return Path(os.environ.get("OLLAMA_MODELS") or Path.home() / ".ollama" / "models")


def is_manifest(path: Path) -> bool:
    """Whether a file is one of Ollama's manifests, by where it lies."""
    return "manifests" in path.parts[:-1] and _is_file(path)


def _is_file(path: Path) -> bool:
    """Whether it is one that can be seen; a name that is too long is none."""
    with suppress(OSError):
        return path.is_file()
    return False


def blob_of(name: str) -> Path:
    """The blob of ``ollama://NAME[:TAG]``. Raises UsageError, ModelRefused."""
    text = name.removeprefix(SCHEME)
    if _NAME.fullmatch(text) is None:  # no part begins with a dot
        raise UsageError(f"model: expected {SCHEME}NAME[:TAG], got {name[:200]!r}")
    model, _, tag = text.partition(":")
    parts = model.split("/")
    host_and_owner = ("registry.ollama.ai", "library")[: 3 - len(parts)]
    path = folder().joinpath("manifests", *host_and_owner, *parts, tag or "latest")
    if not _is_file(path):
        raise ModelRefused(f"{name}: expected a manifest of Ollama, found no {path}; ollama list?")
    return blob(path)


def blob(manifest: Path) -> Path:
    """The model's blob that a manifest names. Raises ModelRefused."""
    try:
        with manifest.open("rb") as file:
            data = json.loads(file.read(_MANIFEST_LIMIT))
        layers = [layer for layer in data["layers"] if layer["mediaType"] == _MODEL_LAYER]
        digests = [str(layer["digest"]) for layer in layers]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise ModelRefused(
            f"{manifest}: expected a manifest of Ollama, got something else"
        ) from None
    if len(digests) != 1 or _DIGEST.fullmatch(digests[0]) is None:
        raise ModelRefused(f"{manifest}: expected one model's blob, got {len(digests)}")
    root = next(p.parent for p in manifest.absolute().parents if p.name == "manifests")
    return root / "blobs" / digests[0].replace(":", "-")


def models() -> dict[str, Path]:
    """Ollama's models on this machine, by the names they are opened by, and their blobs."""
    root = folder() / "manifests"
    found = {}
    for path in sorted(root.glob("*/*/*/*")):
        host, owner, model, tag = path.relative_to(root).parts
        short = model if (host, owner) == ("registry.ollama.ai", "library") else f"{owner}/{model}"
        if host != "registry.ollama.ai":
            short = f"{host}/{short}"
        try:
            found[f"{SCHEME}{short}:{tag}"] = blob(path)
        except ModelRefused:
            continue  # something else, which has no name here
    return found
