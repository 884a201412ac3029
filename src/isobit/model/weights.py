"""A model file as the graph of its pass."""

from dataclasses import dataclass, replace

from isobit.config import Metadata, ModelConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import architecture
from isobit.model.graph import Graph
from isobit.model.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Weights:
    """A model's graph with its tensors; matrices stay quantised views into the mapped file."""

    config: ModelConfig
    graph: Graph
    file: GGUFFile | None = None
    """What they are from, if it is one that another process can open, too."""

    @classmethod
    def from_file(cls, file: GGUFFile) -> "Weights":
        """Find and check every tensor. Touches none.

        Raises ModelRefused for a file that is not of a known architecture, or not whole.
        """
        source = str(file.path)
        arch = architecture(file.metadata, source)
        if not file.tensors and not file.refused:
            raise ModelRefused(f"{source}: expected a model, got its vocabulary without weights")
        tensors = Tensors(file)
        c = arch.config(
            Metadata(file.metadata, source, file.called), tensors.rows("token_embd.weight")
        )
        graph = arch.graph(c, tensors)
        tensors.nothing_else()
        return cls(c, graph, file)

    @classmethod
    def draft_from_file(cls, file: GGUFFile) -> "Weights":
        """The block that drafts the token after the next, as a model of its own: it reads the
        model's ``final_norm`` besides tokens (``Batch.received``).

        Raises ModelRefused for a file without one.
        """
        source = str(file.path)
        arch, tensors = architecture(file.metadata, source), Tensors(file)
        c = arch.config(Metadata(file.metadata, source), tensors.rows("token_embd.weight"))
        if arch.draft is None:
            raise ModelRefused(f"{source}: draft block: expected one, {c.architecture} has none")
        return cls(replace(c, n_layers=1), arch.draft(c, tensors))
