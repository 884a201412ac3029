"""The architectures that can be read, one file each: from a file's metadata and tensors to the
graph of a pass."""

from collections.abc import Callable

from isobit.config import ModelConfig
from isobit.model.architectures import qwen3
from isobit.model.graph import Graph
from isobit.model.tensors import Tensors

GRAPHS: dict[str, Callable[[ModelConfig, Tensors], Graph]] = {
    "qwen3": qwen3.graph,
    "qwen3moe": qwen3.graph,
}
"""How the graph of an architecture is made, by its name in ``general.architecture``."""
