"""Where a model comes from: a path, the Hugging Face hub, or what Ollama keeps.

Owns the names that stand for models. Files of the hub lie in the cache that other tools use too.
"""

import os
from collections.abc import Callable
from pathlib import Path

from isobit.errors import ModelRefused
from isobit.hub import ollama
from isobit.hub.names import SCHEME, HubName, looks_like_hub

__all__ = ["find"]


def find(model: str | os.PathLike[str], note: Callable[[str], None] | None = None) -> Path:
    """The file of a model: a path as it is, or one that these names stand for.

    ``hf://ORG/REPO[@REVISION][:QUANT]`` or ``hf://ORG/REPO/FILE.gguf``: what the cache has,
    downloaded first if it has none. ``ollama://NAME[:TAG]``, or the path of Ollama's manifest: the
    blob that it names. ``note`` is told what was chosen.
    Raises UsageError for a name that is none, ModelRefused for a model that is not to be had.
    """
    text = os.fspath(model)
    if text.startswith(SCHEME):
        from isobit.hub.cache import cached  # noqa: PLC0415 - the hub's client takes a while
        from isobit.hub.download import pull  # noqa: PLC0415

        name = HubName.parse(text)
        return cached(name, note) or pull(name, note)
    if text.startswith(ollama.SCHEME):
        return ollama.blob_of(text)
    path = Path(model)
    if looks_like_hub(text) and not Path(text.partition(":")[0]).exists():
        raise ModelRefused(
            f"{text}: expected a file, found none; a model of the Hugging Face hub is "
            f"{SCHEME}{text.removeprefix('https://huggingface.co/')}"
        )
    return ollama.blob(path) if ollama.is_manifest(path) else path
