"""The architectures that can be read, one file each: from a file's metadata and tensors to the
graph of a pass."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from isobit.config import Metadata, ModelConfig
from isobit.model.architectures import (
    deepseek2,
    gemma,
    glm4moe,
    gpt_oss,
    granite,
    lfm2,
    llama,
    minimax,
    nemotron_h,
    olmoe,
    qwen3,
    qwen35,
)
from isobit.model.graph import Graph
from isobit.model.huggingface import HuggingFace
from isobit.model.tensors import Tensors


class Architecture(NamedTuple):
    """How a file of an architecture is read."""

    config: Callable[[Metadata, int], ModelConfig]
    """From the metadata and the number of rows of the embedding."""
    graph: Callable[[ModelConfig, Tensors], Graph]
    draft: Callable[[ModelConfig, Tensors], Graph] | None = None
    """Of the block that guesses the token after the next; None: it has none."""


_QWEN3 = Architecture(qwen3.config, qwen3.graph)
_QWEN35 = Architecture(qwen35.config, qwen35.graph, qwen35.draft)
_GEMMA = Architecture(gemma.config, gemma.graph)
_GRANITE = Architecture(granite.config, granite.graph)
_LFM2 = Architecture(lfm2.config, lfm2.graph)
_LLAMA = Architecture(llama.config, llama.graph)
_NEMOTRON_H = Architecture(nemotron_h.config, nemotron_h.graph)
ARCHITECTURES: dict[str, Architecture] = {
    "deepseek2": Architecture(deepseek2.config, deepseek2.graph),
    "gemma3": _GEMMA,
    "gemma4": _GEMMA,
    "glm4moe": Architecture(glm4moe.config, glm4moe.graph),
    "gpt-oss": Architecture(gpt_oss.config, gpt_oss.graph),
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "lfm2": _LFM2,
    "lfm2moe": _LFM2,
    "llama": _LLAMA,
    "minimax-m2": Architecture(minimax.config, minimax.graph),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": _NEMOTRON_H,
    "olmoe": Architecture(olmoe.config, olmoe.graph),
    "qwen2": _LLAMA,
    "qwen2moe": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3moe": _QWEN3,
    "qwen3vl": _QWEN3,
    "qwen3vlmoe": _QWEN3,
    "qwen3next": _QWEN35,
    "qwen35": _QWEN35,
    "qwen35moe": _QWEN35,
}
"""By the name in ``general.architecture``."""
HUGGING_FACE: dict[str, HuggingFace] = {
    **deepseek2.HUGGING_FACE,
    **gemma.HUGGING_FACE,
    **glm4moe.HUGGING_FACE,
    **gpt_oss.HUGGING_FACE,
    **granite.HUGGING_FACE,
    **lfm2.HUGGING_FACE,
    **llama.HUGGING_FACE,
    **minimax.HUGGING_FACE,
    **olmoe.HUGGING_FACE,
    **qwen3.HUGGING_FACE,
    **qwen35.HUGGING_FACE,
}
"""By config.json's ``model_type``."""


def architecture(metadata: Mapping[str, object], source: str) -> Architecture:
    """The architecture of a model; raises ModelRefused for one that is not implemented.

    Asked first: what such a model lacks besides would only be called missing.
    """
    r = Metadata(metadata, source)
    name = r.text("general.architecture")
    if name not in ARCHITECTURES:
        raise r.refusal("general.architecture", f"one of {' '.join(ARCHITECTURES)}", name)
    return ARCHITECTURES[name]


def read_config(metadata: Mapping[str, object], *, vocab: int, source: str) -> ModelConfig:
    """The hyper-parameters of a file; ``vocab`` is the embedding's number of rows.

    Raises ModelRefused naming the key for anything missing, malformed or not implemented.
    """
    return architecture(metadata, source).config(Metadata(metadata, source), vocab)
