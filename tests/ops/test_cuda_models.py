"""Whole models of every architecture on the CUDA backend, bit for bit, cut in several ways."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.parallel.layers import layers
from isobit.model.weights import Weights
from isobit.runtime.model import Model, sample_path
from isobit.verify.faults import with_backend
from isobit.verify.trace import ModelRun
from isobit.verify.verify import verify
from tests.helpers.seed import SEED
from tests.model import (
    test_deepseek2,
    test_gemma,
    test_glm4moe,
    test_gpt_oss,
    test_granite,
    test_lfm2,
    test_llama,
    test_minimax,
    test_nemotron_h,
    test_olmoe,
    test_qwen3next,
    test_qwen35,
)

from .cuda_support import open_cuda, same
from .test_cuda_forward import ALWAYS

KINDS = (
    *((test_llama, kind) for kind in test_llama.GEOMETRIES),
    *((test_gemma, kind) for kind in test_gemma.KINDS),
    *(
        (module, kind)
        for module in (test_deepseek2, test_glm4moe, test_granite, test_lfm2)
        for kind in module.SHAPES
    ),
)
MODELS = {
    **{kind: partial(module.write, kind=kind) for module, kind in KINDS},
    **{f"olmoe-{kind}": partial(test_olmoe.write, kind=kind) for kind in test_olmoe.SHAPES},
    "gpt-oss": test_gpt_oss.write,
    "minimax-m2": partial(test_minimax.write, kind="M2"),
    **{f"nemotron-{k}": partial(test_nemotron_h.write, kind=k) for k in test_nemotron_h.SHAPES},
    "qwen3next": test_qwen3next.write,
    "qwen35": test_qwen35.write_dense,
}
EMULATED = (
    *("llama3", "mixtral", "qwen2", "yarn", "olmoe-several", "DeepseekV2", "gemma3", "gemma4"),
    *(
        "big",
        "GraniteMoeShared",
        "lfm2moe",
        "gpt-oss",
        "minimax-m2",
        "nemotron-latent",
        "qwen3next",
    ),
)
"""One at least of each architecture."""
HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"
LENGTHS = {"emulated": 9, "cuda": 150}
CUTS = {"emulated": [0, 4, 7], "cuda": [0, 1, 40, 105, 148]}
OTHERS = {"emulated": 3, "cuda": 90}


def logits_of(backend, tokens, cuts):
    """Two sequences at once, the second shorter: all logits of the first, a pass for each cut, and
    those of both one step later."""
    found, n, m = [], len(tokens[0]), len(tokens[1])
    pages = np.random.default_rng(SEED).permutation(8).astype(np.int32).reshape(2, 4)
    states = np.array([1, 0], np.int32)

    def forward(parts, rows):
        ids = np.concatenate([tokens[s][a:b] for s, a, b in parts])
        positions = np.concatenate([np.arange(a, b) for _, a, b in parts])
        sequence = np.repeat([s for s, _, _ in parts], [b - a for _, a, b in parts])
        i32 = (np.ascontiguousarray(x, np.int32) for x in (ids, positions, sequence, pages, rows))
        return np.array(backend.forward(Batch(*i32, states)))

    forward([(1, 0, m - 1)], [0])
    for a, b in zip(cuts, [*cuts[1:], n - 1], strict=True):
        found.append(forward([(0, a, b)], np.arange(b - a)))
    found.append(forward([(0, n - 1, n), (1, m - 1, m)], [0, 1]))  # a step of both
    return np.concatenate(found)


def compare(kind, path, planes, fused):
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        engine = EngineConfig(activation_bits=8 * planes, context=256, max_sequences=2, chunk=64)
        ours, theirs = open_cuda(kind, weights, engine, fused=fused), CpuBackend(weights, engine)
        vocab = weights.config.vocab
        tokens = [rng.integers(0, vocab, n) for n in (LENGTHS[kind], OTHERS[kind])]
        same(logits_of(ours, tokens, CUTS[kind]), logits_of(theirs, tokens, CUTS[kind]))
        ours.close()
        theirs.close()


@pytest.mark.parametrize(
    ("kind", "planes", "fused"),
    [("emulated", 2, True), ("cuda", 1, True), ("cuda", 2, True), ("cuda", 2, False)],
)
def test_delta_nets_beside_attention(kind, planes, fused):
    compare(kind, HYBRID, planes, fused)


@pytest.mark.parametrize(
    ("kind", "model"), [("emulated", m) for m in EMULATED] + [("cuda", m) for m in MODELS]
)
def test_architectures(tmp_path, kind, model):
    MODELS[model](tmp_path / "m.gguf")
    compare(kind, tmp_path / "m.gguf", 1 if model == "yarn" else 2, True)


@pytest.mark.parametrize("kind", ["emulated", "cuda"])
def test_layers_on_a_gpu_beside_layers_on_a_processor(kind):
    """What one stage of a model gives, another receives."""
    engine = EngineConfig(context=192, max_sequences=1, chunk=64)
    rng = np.random.default_rng(SEED)
    with GGUFFile.open(sample_path()) as file:
        whole, n = Weights.from_file(file), LENGTHS[kind]
        tokens, pages = rng.integers(0, 500, n).astype(np.int32), np.array([[1, 0, 2]], np.int32)
        stages = []
        for first, end in ((0, 2), (2, 7), (7, 8)):
            part = Weights(whole.config, layers(whole.graph, first, end))
            stages.append(CpuBackend(part, engine) if first == 2 else open_cuda(kind, part, engine))
        theirs = CpuBackend(whole, engine)
        for a, b in ((0, n - 1), (n - 1, n)):
            at, rows = np.arange(a, b, dtype=np.int32), np.arange(b - a, dtype=np.int32)
            given = None
            for stage in stages:
                batch = Batch(tokens[a:b], at, 0 * at, pages, rows, received=given)
                given = np.array(stage.forward(batch))
            same(given, theirs.forward(Batch(tokens[a:b], at, 0 * at, pages, rows)))
        for backend in (*stages, theirs):
            backend.close()


@pytest.mark.parametrize("fused", [True, False])
def test_verify_looks_at_what_runs(fused):
    """Each stage of prompts and of a step; and a wrong one is found where it first shows."""
    ids = np.random.default_rng(SEED).integers(0, 500, 5).tolist()

    def opened(weights, engine):
        return open_cuda("emulated", weights, engine, fused=fused)

    with (
        Model(sample_path(), "cpu", EngineConfig(context=64, max_sequences=1)) as y,
        with_backend(y, opened) as x,
    ):
        found = verify(x, ModelRun(y), ids)
        assert found.identical
        assert found.a.backend == ("cuda" if fused else "cuda:unfused")
        names = {s.stage for s in found.stages}
        assert names == ALWAYS if fused else names > ALWAYS
        norm = x.backend._programs.resident.weights.vectors["blk.2.ffn_norm.weight"]
        at = x.backend._programs.resident.weights.region.address + norm
        x.backend._gpu.upload(at, np.full(1, 3, np.float32))
        found = verify(x, ModelRun(y), ids)
        assert found.first.where == f"{'moe_router_logits' if fused else 'ffn_norm'} of layer 2"
        assert found.faulty[0].where == found.first.where
