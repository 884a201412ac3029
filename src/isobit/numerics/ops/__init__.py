"""The kinds of operation that a model is made of, one file each: what an architecture writes its
graph with, and what a backend has a kernel for."""

from isobit.numerics.ops.add import Add
from isobit.numerics.ops.attention import (
    Append,
    Attention,
    AttentionScores,
    AttentionSoftmax,
)
from isobit.numerics.ops.base import (
    HISTORY,
    LOGIT_ROWS,
    TOKENS,
    Array,
    Arrays,
    Context,
    Operation,
    Shape,
    UnpackCache,
)
from isobit.numerics.ops.combine import Combine
from isobit.numerics.ops.embedding import Embedding
from isobit.numerics.ops.heads import Heads
from isobit.numerics.ops.matmul import ExpertMatMul, MatMul
from isobit.numerics.ops.rms_norm import RmsNorm
from isobit.numerics.ops.rope import Rope
from isobit.numerics.ops.select_rows import SelectRows
from isobit.numerics.ops.silu_gate import SiluGate
from isobit.numerics.ops.top_k import TopK

__all__ = [
    "HISTORY",
    "LOGIT_ROWS",
    "TOKENS",
    "Add",
    "Append",
    "Array",
    "Arrays",
    "Attention",
    "AttentionScores",
    "AttentionSoftmax",
    "Combine",
    "Context",
    "Embedding",
    "ExpertMatMul",
    "Heads",
    "MatMul",
    "Operation",
    "RmsNorm",
    "Rope",
    "SelectRows",
    "Shape",
    "SiluGate",
    "TopK",
    "UnpackCache",
]
