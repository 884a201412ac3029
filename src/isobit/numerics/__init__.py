"""The specification in NumPy: docs/numerics.md, section by section, readable before fast.

Every backend must return the bits these functions return.
"""

from isobit.numerics.attention import (
    KV_PAGE,
    attention,
    attention_scale,
    attention_scores,
    attention_softmax,
)
from isobit.numerics.fixed import LIMIT, planes_of, quantise, quantise_rows
from isobit.numerics.logprobs import log, log_softmax, top_logprobs
from isobit.numerics.matmul import IntegerWeight, Weight, matmul
from isobit.numerics.moe import combine, top_k
from isobit.numerics.pointwise import exp, rms_norm, rope, silu_gate, sum256, tree
from isobit.numerics.rope_table import RopeTable, inverse_frequencies, rope_table
from isobit.numerics.sampling import SAMPLING_VERSION

VERSION = 1
"""The numerics version that docs/numerics.md defines; it stands in every trace and receipt."""

__all__ = [
    "KV_PAGE",
    "LIMIT",
    "SAMPLING_VERSION",
    "VERSION",
    "IntegerWeight",
    "RopeTable",
    "Weight",
    "attention",
    "attention_scale",
    "attention_scores",
    "attention_softmax",
    "combine",
    "exp",
    "inverse_frequencies",
    "log",
    "log_softmax",
    "matmul",
    "planes_of",
    "quantise",
    "quantise_rows",
    "rms_norm",
    "rope",
    "rope_table",
    "silu_gate",
    "sum256",
    "top_k",
    "top_logprobs",
    "tree",
]
