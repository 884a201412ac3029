"""The architectures that can be read, one file each: from a file's metadata and tensors to the
graph of a pass.

Each file declares by name what it reads, in ``ARCHITECTURES``, and the models of transformers that
it knows, in ``HUGGING_FACE``; no other place lists them.
"""

from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

from isobit.config import Metadata, ModelConfig
from isobit.errors import ModelRefused
from isobit.model.architectures.architecture import Architecture
from isobit.model.huggingface import HuggingFace

ARCHITECTURES: dict[str, Architecture] = {}
"""By the name in ``general.architecture``."""
HUGGING_FACE: dict[str, HuggingFace] = {}
"""By config.json's ``model_type``."""
for _file in iter_modules(__path__):
    _declared = vars(import_module(f"{__name__}.{_file.name}"))
    ARCHITECTURES |= _declared.get("ARCHITECTURES", {})
    HUGGING_FACE |= _declared.get("HUGGING_FACE", {})

_NO_MODELS = {
    "adapter": "an adapter; llama-export-lora merges it into its model",
    "mmproj": "the part that reads images; the model's own file runs without it, for text",
    "imatrix": "an importance matrix, which llama-quantize reads",
}
"""By ``general.type``."""
_WAYS_ON = {
    "clip": _NO_MODELS["mmproj"],
    "imatrix": _NO_MODELS["imatrix"],
    "gptoss": "Ollama's own form of gpt-oss; hf://ggml-org/gpt-oss-20b-GGUF is one that runs",
}


def architecture(metadata: Mapping[str, object], source: str) -> Architecture:
    """The architecture of a model; raises ModelRefused for one that is not implemented.

    Asked first: what such a model lacks besides would only be called missing.
    """
    r = Metadata(metadata, source)
    name, kind = r.text("general.architecture"), metadata.get("general.type")
    if isinstance(kind, str) and kind in _NO_MODELS:
        raise ModelRefused(f"{source}: expected a model, got {_NO_MODELS[kind]}")
    if name in _WAYS_ON:
        raise ModelRefused(f"{source}: expected a model, got {_WAYS_ON[name]}")
    if name not in ARCHITECTURES:
        raise r.refusal("general.architecture", f"one of {' '.join(ARCHITECTURES)}", name)
    return ARCHITECTURES[name]


def read_config(metadata: Mapping[str, object], *, vocab: int, source: str) -> ModelConfig:
    """The hyper-parameters of a file; ``vocab`` is the embedding's number of rows.

    Raises ModelRefused naming the key for anything missing, malformed or not implemented.
    """
    return architecture(metadata, source).config(Metadata(metadata, source), vocab)
