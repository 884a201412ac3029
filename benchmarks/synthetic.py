"""Models of a known geometry whose tensors share some random bytes: no file, and little memory.

Bits and speed need no trained weights. Every tensor is a piece of one pool of its format, valid
blocks whose scales give weights of spread 0.02; no two begin at the same byte.
"""

import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from zlib import crc32

import numpy as np

from isobit.gguf import formats
from isobit.model.architectures import qwen3, qwen35
from isobit.model.weights import Weights
from isobit.numerics import Weight

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.geometries import QWEN3_30B_A3B as A3B
from tests.helpers.geometries import AnyTensors

A22B = replace(A3B, n_layers=94, hidden=4096, n_heads=64, ffn=1536)
TINY = replace(
    A3B, n_layers=8, hidden=256, n_heads=8, ffn=256, n_experts=8, n_experts_used=2, vocab=1024
)

HYBRID = qwen35.Config(
    architecture="qwen35moe",
    n_layers=40,
    hidden=2048,
    n_heads=16,
    n_kv_heads=2,
    head_dim=256,
    ffn=512,
    n_experts=256,
    n_experts_used=8,
    vocab=248320,
    rope_base=1e7,
    eps=1e-6,
    context_length=262144,
    normalise_experts=True,
    recurrent=tuple((i + 1) % 4 != 0 for i in range(40)),
    rotated=64,
    key_heads=16,
    value_heads=32,
    state_size=128,
    conv_kernel=4,
    shared_ffn=512,
)
TINY_HYBRID = replace(
    HYBRID,
    n_layers=4,
    hidden=512,
    n_heads=4,
    ffn=256,
    n_experts=12,
    n_experts_used=3,
    vocab=1024,
    recurrent=HYBRID.recurrent[:4],
    key_heads=4,
    value_heads=8,
    shared_ffn=256,
)

MODELS = {
    "30b-a3b": (A3B, "Q4_K"),
    "235b-a22b": (A22B, "Q5_K"),
    "tiny": (TINY, "Q4_K"),
    "hybrid-35b-a3b": (HYBRID, "Q4_K"),
    "tiny-hybrid": (TINY_HYBRID, "Q4_K"),
}
"""Geometries of Qwen3 and Qwen3.5, and one to try things with; the format of most matrices:
mixtures as Q4_K_M and Q5_K_M are."""

_APART = 64
"""Blocks between the beginnings of two tensors."""
_D = {"Q4_K": (190.0, 7.5), "Q5_K": (390.0, 15.5), "Q6_K": (18.5 * 73, 0.0)}
"""The spread of sub-scale times code, and the middle of the codes."""
_PLAIN = {"ffn_gate_inp": (), "ssm_conv1d": (0.5, 0), "ssm_dt.bias": (1, 0), "ssm_a": (0.3, -1)}
"""Float tensors: the spread and the middle of their values, of a router by its width; of all other
vectors 0.1 about 1."""


def weights(name, layers=None):
    """A model of :data:`MODELS`, or its first layers."""
    config, matrices = MODELS[name]
    if layers is not None:
        config = replace(config, n_layers=layers)
        if isinstance(config, qwen35.Config):
            config = replace(config, recurrent=config.recurrent[:layers])
    architecture = qwen35 if isinstance(config, qwen35.Config) else qwen3
    return Weights(config, architecture.graph(config, _Pools(config, matrices)))


class _Pools(AnyTensors):
    """Tensors by name, as isobit.model.tensors has those of a file."""

    source = "synthetic"

    def __init__(self, config, matrices):
        self._layers, self._matrices = config.n_layers, _format(matrices)
        stack = max(config.n_experts, 1) * config.ffn * config.hidden
        self._values = max(stack, config.vocab * config.hidden)
        self._pools = {}

    def take(self, name, *shape):
        """A tensor of that shape."""
        role = name.split(".", 2)[-1].removesuffix(".weight")
        if len(shape) == 1 or role in _PLAIN:
            rng = np.random.default_rng(crc32(name.encode()))
            router = 2 * shape[-1] ** -0.5, 0.0
            spread, middle = router if "gate_inp" in role else _PLAIN.get(role, (0.1, 1))
            values = (middle + spread * rng.standard_normal(shape)).astype(np.float32)
            return Weight(name, formats.F32, shape, values.reshape(-1).view(np.uint8))
        fmt = _format("Q6_K") if self._finer(name) else self._matrices
        pool = self._pools.get(fmt) or self._pools.setdefault(fmt, _Pool(fmt, self._values))
        return Weight(name, fmt, shape, pool.take(prod(shape)))

    def _finer(self, name):
        """Whether llama.cpp's K_M mixtures give a tensor Q6_K."""
        if name == "output.weight":
            return True
        if "attn_qkv" in name:
            return True
        if not ("attn_v" in name or "ffn_down" in name):
            return False
        i, n = int(name.split(".")[1]), self._layers
        return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


class _Pool:
    """Random blocks of a format."""

    def __init__(self, fmt, values):
        self._fmt, self._taken = fmt, 0
        blocks = values // fmt.block_size + 8192 * _APART
        self._bytes = np.random.default_rng(fmt.ggml_type).integers(
            0, 256, (blocks, fmt.block_bytes), np.uint8
        )
        width, middle = _D[fmt.name]
        d = np.float16(0.02 / width)
        if middle:  # d and dmin come first, else d last
            self._bytes[:, :4] = np.array([d, np.float16(d * middle)]).view(np.uint8)
        else:
            self._bytes[:, -2:] = np.array([d]).view(np.uint8)

    def take(self, values):
        """The bytes of so many values."""
        first, self._taken = self._taken, self._taken + _APART
        count = values // self._fmt.block_size
        return self._bytes[first : first + count].reshape(-1)


def _format(name):
    return next(f for f in formats.FORMATS.values() if f.name == name)
