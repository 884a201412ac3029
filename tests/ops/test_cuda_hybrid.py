"""Layers of Qwen3.5 on the CUDA backend: whole in six launches of a step, and beside others."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from isobit.backends.cpu import CpuBackend
from isobit.config import EngineConfig
from isobit.gguf.formats import F32, FORMATS
from isobit.model.architectures import qwen35
from isobit.model.weights import Weights
from isobit.numerics import Weight
from tests.helpers.geometries import AnyTensors
from tests.helpers.seed import SEED
from tests.helpers.synth import _random

from .cuda_emulator import EmulatedGpu
from .cuda_support import open_gpu, ragged, same, sized
from .test_cuda_decode import kernels_of_step

CONFIG = qwen35.Config(
    architecture="qwen35moe",
    n_layers=2,
    hidden=512,
    n_heads=2,
    n_kv_heads=1,
    head_dim=128,
    ffn=256,
    n_experts=5,
    n_experts_used=2,
    vocab=512,
    rope_base=1e7,
    eps=1e-6,
    context_length=1024,
    normalise_experts=True,
    recurrent=(True, False),
    rotated=64,
    key_heads=2,
    value_heads=8,
    state_size=32,
    conv_kernel=4,
    shared_ffn=256,
)
FUSED = ["decode_attn_out", "decode_router", "decode_gate_up", "decode_down"]


class Random(AnyTensors):
    """Random weights: Q4_K matrices but of some roles; floats in their range."""

    def __init__(self, seed, formats):
        self._rng, self._formats = np.random.default_rng(seed), formats

    def take(self, name, *shape):
        role = name.split(".", 2)[-1].removesuffix(".weight")
        floats = len(shape) == 1 or role in ("ffn_gate_inp", "ssm_conv1d")
        if floats and role not in self._formats:
            about = {"ssm_a": -1, "ssm_dt.bias": 0, "ssm_conv1d": 0}.get(
                role, 0 if "gate" in role else 1
            )
            values = (about + 0.3 * self._rng.standard_normal(shape)).astype(np.float32)
            return Weight(name, F32, shape, values.reshape(-1).view(np.uint8))
        kind = self._formats.get(role, "Q4_K")
        fmt = next(f for f in FORMATS.values() if f.name == kind)
        data = _random(self._rng, kind, shape, 2 * shape[-1] ** -0.5)
        return Weight(name, fmt, shape, data.reshape(-1).view(np.uint8))


def made(config=CONFIG, formats=None):
    formats = {"attn_qkv": "Q6_K"} if formats is None else formats
    return Weights(config, qwen35.graph(config, Random(SEED, formats)))


def agree(weights, kind, planes=2, steps=2, seen=None):
    """Logits of passes one after the other, the CPU's beside a device's; kernels of a step.

    seen: gets the names and definitions of all kernels of the passes.
    """
    print("seed", SEED)
    gpu = EmulatedGpu(SEED, bulk=bool(SEED % 2)) if kind == "emulated" else open_gpu(kind)
    if seen is not None:
        launch = gpu.launch

        def noted(stem, kernel, *given, **how):
            seen.append((kernel, how.get("defines") or {}))
            launch(stem, kernel, *given, **how)

        gpu.launch = noted
    engine = EngineConfig(8 * planes, context=384, max_sequences=2, chunk=384)
    first = 3 if kind == "emulated" else 250
    parts = [[(0, first), (0, 12)], *([(first + i, 1)] for i in range(steps)), [(0, 1)], [(1, 1)]]
    parts += [] if kind == "emulated" else [[(2, 1), (12, 1)], [(3, 1), (13, 2)]]
    rng, pages = np.random.default_rng(SEED), np.arange(12, dtype=np.int32).reshape(2, 6)
    ours, theirs = sized()(weights, engine, gpu), CpuBackend(weights, engine)
    with closing(ours), closing(theirs):
        names = kernels_of_step(ours)
        for part in parts:
            batch = ragged(rng, weights.config.vocab, part, pages[: len(part)])
            same(ours.forward(batch), theirs.forward(batch))
    return names


@pytest.mark.parametrize(("kind", "planes"), [("emulated", 2), ("cuda", 1), ("cuda", 2)])
def test_layers_are_six_launches(kind, planes):
    """Also with more tiles of keys than the output product merges, on a device."""
    names = agree(made(), kind, planes, steps=2 if kind == "emulated" else 10)
    layers = "decode_qkv", "decode_delta", *FUSED, "decode_qkv", "decode_attention", *FUSED
    assert names == ["embed", *layers, "decode_head"]


@pytest.mark.parametrize("kind", ["emulated", "cuda"])
def test_a_matrix_of_another_format_costs_its_layer_alone(kind):
    names = agree(made(formats={"ssm_out": "Q8_0"}), kind)
    assert "decode_attention" in names
    assert "decode_delta" not in names


def test_a_dense_feed_forward():
    dense = replace(CONFIG, architecture="qwen35", n_experts=0, n_experts_used=0, shared_ffn=0)
    names = agree(made(dense), "cuda", steps=10)
    assert names.count("decode_delta") == names.count("decode_attention") == 1


@pytest.mark.parametrize(("gate", "fused"), [("F32", True), ("F16", False), ("Q8_0", False)])
def test_a_shared_expert_s_gate_may_have_any_format(gate, fused):
    """The sum of a pass takes it if it is of floats, and is apart from it else."""
    formats, seen = {"attn_qkv": "Q6_K", "ffn_gate_inp_shexp": gate}, []
    agree(made(formats=formats), "emulated", seen=seen)
    assert any(name == "norm_quantise" and "SHARED" in defines for name, defines in seen) is fused
    assert any(name == "gated_add" for name, _ in seen) is not fused
