"""Geometries of large models, and tensors of any name and shape to build their graphs of.

Imports nothing but the package: benchmarks use it too.
"""

from isobit.config import ModelConfig
from isobit.numerics import Weight

QWEN3_30B_A3B = ModelConfig(
    architecture="qwen3moe",
    n_layers=48,
    hidden=2048,
    n_heads=32,
    n_kv_heads=4,
    head_dim=128,
    ffn=768,
    n_experts=128,
    n_experts_used=8,
    vocab=151936,
    rope_base=1e6,
    eps=1e-6,
    context_length=40960,
    normalise_experts=True,
)


class AnyTensors:
    """What ``isobit.model.tensors`` has of a file, of no file: every tensor but a bias is there."""

    source = "geometry"

    def __contains__(self, name: str) -> bool:
        return name == "output.weight"

    def take(self, name: str, *shape: int) -> Weight:
        """A tensor of that shape."""
        raise NotImplementedError

    def leave_out_layers(self, first: int) -> None:
        """There are none."""

    def leave_out(self, name: str) -> None:
        """There is none."""

    def split(self, name: str, parts: object) -> None:
        """They are apart."""
