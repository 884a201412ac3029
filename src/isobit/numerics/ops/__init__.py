"""The kinds of operation that a model is made of, one file each: what an architecture writes its
graph with, and what a backend has a kernel for.

The names here are for whoever needs many; nothing looks a kind up in them, so that a new one need
not stand here to be used.
"""

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
    Exchange,
    Operation,
    Shape,
    UnpackCache,
)
from isobit.numerics.ops.bias import Bias
from isobit.numerics.ops.causal_conv import CausalConv
from isobit.numerics.ops.clamped_gate import ClampedGate
from isobit.numerics.ops.columns import Columns
from isobit.numerics.ops.combine import Combine
from isobit.numerics.ops.decay import Decay
from isobit.numerics.ops.embedding import Embedding
from isobit.numerics.ops.expert_bias import ExpertBias
from isobit.numerics.ops.gated_add import GatedAdd
from isobit.numerics.ops.gated_delta import GatedDelta
from isobit.numerics.ops.gather import Gather, GatherExperts
from isobit.numerics.ops.gelu_gate import GeluGate
from isobit.numerics.ops.heads import Heads
from isobit.numerics.ops.join import Join
from isobit.numerics.ops.l2_norm import L2Norm
from isobit.numerics.ops.matmul import ExpertMatMul, MatMul
from isobit.numerics.ops.multiply import Multiply
from isobit.numerics.ops.receive import Receive
from isobit.numerics.ops.relu_squared import ReluSquared
from isobit.numerics.ops.rms_norm import RmsNorm
from isobit.numerics.ops.rope import Rope
from isobit.numerics.ops.scale import ExpertScale, Scale
from isobit.numerics.ops.select_rows import SelectRows
from isobit.numerics.ops.sigmoid import Sigmoid
from isobit.numerics.ops.sigmoid_gate import SigmoidGate
from isobit.numerics.ops.silu import Silu
from isobit.numerics.ops.silu_gate import SiluGate
from isobit.numerics.ops.softcap import Softcap
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
    "Bias",
    "CausalConv",
    "ClampedGate",
    "Columns",
    "Combine",
    "Context",
    "Decay",
    "Embedding",
    "Exchange",
    "ExpertBias",
    "ExpertMatMul",
    "ExpertScale",
    "GatedAdd",
    "GatedDelta",
    "Gather",
    "GatherExperts",
    "GeluGate",
    "Heads",
    "Join",
    "L2Norm",
    "MatMul",
    "Multiply",
    "Operation",
    "Receive",
    "ReluSquared",
    "RmsNorm",
    "Rope",
    "Scale",
    "SelectRows",
    "Shape",
    "Sigmoid",
    "SigmoidGate",
    "Silu",
    "SiluGate",
    "Softcap",
    "TopK",
    "UnpackCache",
]
