"""A model file as the graph of its pass."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from isobit.config import Metadata, ModelConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import architecture
from isobit.model.graph import Graph
from isobit.model.tensors import Tensors
from isobit.numerics import Weight

F32 = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Layer:
    """One transformer layer. The feed-forward's three weights are stacks [experts, rows, columns]
    when ``router`` is given, plain matrices otherwise."""

    attn_norm: F32
    q: Weight
    k: Weight
    v: Weight
    q_norm: F32
    k_norm: F32
    attn_output: Weight
    ffn_norm: F32
    router: Weight | None
    gate: Weight
    up: Weight
    down: Weight


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
        tensors = Tensors(file)
        c = arch.config(Metadata(file.metadata, source), tensors.rows("token_embd.weight"))
        graph = arch.graph(c, tensors)
        tensors.nothing_else()
        return cls(c, graph, file)

    # By role, for the backends that do not read the graph yet.

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Each layer's tensors by role; raises BackendUnavailable if it is not Qwen3's."""
        if self.config.architecture not in ("qwen3", "qwen3moe"):
            raise BackendUnavailable(
                f"architecture {self.config.architecture}: runs on cpu and wgpu so far, not on "
                "this backend: --backend cpu"
            )
        scaled = next((name for name in self.graph.weights if name.endswith(".scale")), None)
        if scaled is not None:  # which the roles below leave out
            raise BackendUnavailable(
                f"tensor {scaled}: products with scales run on the cpu backend so far, not on this "
                "one: --backend cpu"
            )
        return tuple(self._layer(f"blk.{i}.") for i in range(self.config.n_layers))

    @property
    def token_embd(self) -> Weight:
        """The embedding table."""
        return self.graph.weights["token_embd.weight"]

    @property
    def output_norm(self) -> F32:
        """The last norm's weight."""
        return self.graph.weights["output_norm.weight"].float32()

    @property
    def output(self) -> Weight:
        """The output matrix."""
        return self.graph.weights.get("output.weight", self.token_embd)

    def _layer(self, at: str) -> Layer:
        w = self.graph.weights
        tail = "_exps.weight" if self.config.is_moe else ".weight"
        return Layer(
            attn_norm=w[f"{at}attn_norm.weight"].float32(),
            q=w[f"{at}attn_q.weight"],
            k=w[f"{at}attn_k.weight"],
            v=w[f"{at}attn_v.weight"],
            q_norm=w[f"{at}attn_q_norm.weight"].float32(),
            k_norm=w[f"{at}attn_k_norm.weight"].float32(),
            attn_output=w[f"{at}attn_output.weight"],
            ffn_norm=w[f"{at}ffn_norm.weight"].float32(),
            router=w.get(f"{at}ffn_gate_inp.weight"),
            gate=w[f"{at}ffn_gate{tail}"],
            up=w[f"{at}ffn_up{tail}"],
            down=w[f"{at}ffn_down{tail}"],
        )
