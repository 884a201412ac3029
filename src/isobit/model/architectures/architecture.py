"""What a file of this folder declares: how files of its architectures are read."""

from collections.abc import Callable
from typing import NamedTuple

from isobit.config import Metadata, ModelConfig
from isobit.model.graph import Graph
from isobit.model.tensors import Tensors


class Architecture(NamedTuple):
    """How a file of an architecture is read."""

    config: Callable[[Metadata, int], ModelConfig]
    """From the metadata and the number of rows of the embedding."""
    graph: Callable[[ModelConfig, Tensors], Graph]
    draft: Callable[[ModelConfig, Tensors], Graph] | None = None
    """Of the block that guesses the token after the next; None: it has none."""
