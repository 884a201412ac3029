"""What a model split over several devices would move and wait for: the tables of docs/scaling.md.

Takes the graph of a geometry, without its weights, and splits it as `isobit.model.parallel.split`
does; what each part has to read, and what each exchange carries, is counted on the graphs. Times
are those of a step of one sequence, from the constants below; nothing is measured here.

    python -m benchmarks.scaling
"""

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from isobit.config import ModelConfig
from isobit.gguf import formats
from isobit.gguf.formats import Format
from isobit.model.architectures import qwen3, qwen35
from isobit.model.graph import Graph
from isobit.model.parallel.split import split
from isobit.numerics import Weight
from isobit.numerics.ops import Append, Embedding, ExpertMatMul, Gather, GatherExperts

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.geometries import AnyTensors

READ = 4.3e12
"""Bytes a second that an H200 reads (docs/performance.md)."""
STAGE = 2.2e-6
"""Seconds of one dependent kernel on an H200, beside its bytes (docs/performance.md)."""
PEER, PEER_BYTES = 1.0e-6, 384e9
"""Seconds of an exchange of up to 128 KB between two H200s by tagged words in peer memory, and the
bytes a second of a peer copy (benchmarks/results/cuda-exchange-h200.json: one host, NVLink)."""
NCCL = 15e-6
"""Seconds of NCCL's all-gather of 4 to 64 KB there."""
WIRE, WIRE_BYTES = 10e-6, 50e9
"""Assumed of a network between machines: seconds of a message, bytes a second (400 Gbit/s)."""


@dataclass
class Shapes(AnyTensors):
    """Tensors of any name and shape, of one format for matrices: no bytes behind them."""

    matrices: Format

    def take(self, name: str, *shape: int) -> Weight:
        """A tensor of that shape."""
        plain = len(shape) == 1 or "ffn_gate_inp" in name or "conv1d" in name
        fmt = formats.F32 if plain else self.matrices
        size = int(np.prod(shape)) // fmt.block_size * fmt.block_bytes
        return Weight(name, fmt, shape, np.broadcast_to(np.uint8(0), (size,)))


def _format(name: str) -> Format:
    return next(f for f in formats.FORMATS.values() if f.name == name)


def qwen35_397b() -> Graph:
    """Qwen3.5-397B-A17B: 60 layers, every fourth with attention."""
    c = qwen35.Config(
        architecture="qwen35moe",
        n_layers=60,
        hidden=4096,
        n_heads=32,
        n_kv_heads=2,
        head_dim=256,
        ffn=1024,
        n_experts=512,
        n_experts_used=10,
        vocab=248320,
        rope_base=1e7,
        eps=1e-6,
        context_length=262144,
        normalise_experts=True,
        recurrent=tuple((i + 1) % 4 != 0 for i in range(60)),
        rotated=64,
        key_heads=16,
        value_heads=64,
        state_size=128,
        conv_kernel=4,
        shared_ffn=1024,
    )
    return qwen35.graph(c, Shapes(_format("Q4_K")))  # type: ignore[arg-type]


def gpt_oss_120b() -> Graph:
    """The matrices of gpt-oss-120b, without biases and sinks, which weigh nothing here."""
    c = ModelConfig(
        architecture="qwen3moe",
        n_layers=36,
        hidden=2880,
        n_heads=64,
        n_kv_heads=8,
        head_dim=64,
        ffn=2880,
        n_experts=128,
        n_experts_used=4,
        vocab=201088,
        rope_base=150000.0,
        eps=1e-5,
        context_length=131072,
        normalise_experts=True,
    )
    return qwen3.graph(c, Shapes(_format("MXFP4")))  # type: ignore[arg-type]


MODELS = {"Qwen3.5-397B-A17B, Q4_K": qwen35_397b, "gpt-oss-120b, MXFP4": gpt_oss_120b}
DEVICES = (1, 2, 4, 8, 16, 32, 64)


def read_bytes(graph: Graph, parts: int = 1) -> float:
    """Bytes of weights that a step of one token reads: of whole experts on so many parts, on
    average the one with most that are chosen."""
    total = 0.0
    for op in graph.ops:
        if isinstance(op.operation, ExpertMatMul):
            (w,), chosen = op.weights, op.inputs[1].shape
            whole = op.operation.part is not None
            most = of_the_busiest(chosen.below, chosen.width, parts) if whole else chosen.width
            total += w.data.nbytes / w.shape[0] * most
        elif not isinstance(op.operation, Embedding):
            total += sum(w.data.nbytes for w in op.weights)
    return total


@cache
def of_the_busiest(experts: int, chosen: int, parts: int) -> float:
    """Of experts chosen at random, how many the part has that has most, on average."""
    chances = np.random.default_rng(1).random((4000, experts))
    draws = chances.argsort(1)[:, :chosen] * parts // experts
    counts = (draws[:, :, None] == np.arange(parts)).sum(1)
    return float(counts.max(1).mean())


def pages_bytes(graph: Graph) -> int:
    """Bytes of KV cache a position: 16-bit integers with a scale a head vector."""
    caches = (op.inputs for op in graph.ops if isinstance(op.operation, Append))
    return sum(h * (2 * d + 4) for kv in caches for h, d in (v.shape.row for v in kv))


def row(graph: Graph, n: int, alone: float, shares: tuple[int, ...] = ()) -> str:
    """A line of the table: a model on n devices; shares: of whole experts."""
    parts = {rank: split(graph, rank, n, "", shares).graph for rank in {0, n - 1, n // 2}}
    largest = max(parts.values(), key=read_bytes)
    held = max(sum(w.data.nbytes for w in g.weights.values()) for g in parts.values())
    gathers = [op for op in largest.ops if isinstance(op.operation, Gather | GatherExperts)]
    moved = sum(op.outputs[0].shape.width * 4 for op in gathers)
    taken = read_bytes(largest, n)
    read = taken / READ
    kernels = alone - read_bytes(graph) / READ
    times = []
    for latency, rate in ((PEER, PEER_BYTES), (NCCL, PEER_BYTES), (WIRE, WIRE_BYTES)):
        wait = sum(latency + op.outputs[0].shape.width * 4 / rate for op in gathers)
        times.append(read + kernels + wait)
    layers = graph.n_layers
    hop = WIRE + graph.ops[0].outputs[0].shape.width * 4 / WIRE_BYTES
    piped = alone + (min(n, layers) - 1) * hop
    per = " | ".join(f"{t * 1e3:.2f}" for t in (*times, piped))
    sizes = f"{held / 1e9:.1f} | {taken / 1e9:.2f} | {pages_bytes(largest) / 1e3:.1f}"
    return f"| {n} | {sizes} | {len(gathers)} | {moved / 1e3:.0f} | {per} |"


def main() -> None:
    """Print the tables."""
    for name, make in MODELS.items():
        graph = make()
        stages = sum(
            op.kind in ("matmul", "expert_matmul", "attention", "gated_delta") for op in graph.ops
        )
        alone = read_bytes(graph) / READ + stages * STAGE
        print(f"\n{name}: {sum(w.data.nbytes for w in graph.weights.values()) / 1e9:.0f} GB")
        most = max(op.inputs[0].shape.row[0] for op in graph.ops if op.kind == "attention")
        several = [n for n in DEVICES if n <= most]
        columns = [row(graph, n, alone) for n in several]
        whole = [row(graph, n, alone, (1,) * n) for n in several[1:]]
        for title, rows in (("Experts by columns", columns), ("Whole experts", whole)):
            heads = "devices | GB held | GB read a step | KB a position | exchanges | KB a step"
            print(f"\n{title}:\n\n| {heads} | ms: peer words | NCCL | network | pipeline |")
            print("\n".join(["|---:" * 10 + "|", *rows]))


if __name__ == "__main__":
    main()
