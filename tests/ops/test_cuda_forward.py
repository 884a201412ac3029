"""A whole pass of the CUDA backend against the reference, stage by stage, bit for bit."""

import numpy as np
import pytest

from isobit.backends.cpu import CpuBackend
from isobit.backends.reference import ReferenceBackend
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.stages import ON_REQUEST
from isobit.model.weights import Weights
from isobit.runtime.model import sample_path
from tests.helpers.seed import SEED
from tests.helpers.synth import Geometry, write_model

from .cuda_support import open_cuda, ragged


@pytest.fixture(scope="module")
def weights():
    with GGUFFile.open(sample_path()) as file:
        yield Weights.from_file(file)


@pytest.fixture(scope="module")
def short(weights, tmp_path_factory):
    """The sample's shape in two layers, and fewer tokens to choose from: an emulated product takes
    a tenth of a second."""
    geometry = Geometry.of(weights.config, layers=2, context=512)
    path = write_model(tmp_path_factory.mktemp("short") / "m.gguf", geometry, seed=SEED)
    with GGUFFile.open(path) as file:
        yield Weights.from_file(file)


def traced(backend, batch):
    found = {}

    def tap(stage, layer, value):
        assert (stage, layer) not in found
        found[stage, layer] = np.array(value)

    return backend.forward(batch, tap), found


def check(ours, theirs, batch):
    logits, stages = traced(ours, batch)
    expected_logits, expected = traced(theirs, batch)
    assert list(stages) == [key for key in expected if key not in ours.fused_away]
    for key, value in stages.items():
        other = np.ascontiguousarray(expected[key])
        assert value.shape == other.shape, key
        assert np.array_equal(value.view(np.uint32), other.view(np.uint32)), key
    assert np.array_equal(logits.view(np.uint32), expected_logits.view(np.uint32))
    plain = ours.forward(batch)  # without a tap; the cache holds the same values again
    assert np.array_equal(plain.view(np.uint32), logits.view(np.uint32))


ALWAYS = {
    *("embedding", "qkv_matmul", "post_attn_residual", "moe_router_logits", "moe_router"),
    *("moe_router_indices", "moe_expert_swiglu", "post_ffn_residual", "lm_head"),
}
"""Stages that the sample's fused passes and steps have all."""


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "planes"), [("emulated", 2), ("cuda", 1), ("cuda", 2)])
def test_every_stage(weights, short, kind, planes, fused, rng):
    """Prompts, a step of each of three sequences, a step of one; each cut otherwise as well."""
    weights = short if kind == "emulated" else weights
    engine = EngineConfig(activation_bits=8 * planes, context=256, max_sequences=3, chunk=4)
    ours = open_cuda(kind, weights, engine, fused=fused)
    theirs = ReferenceBackend(weights, engine)
    given = {s for s, _ in weights.graph.stages if s not in ON_REQUEST}
    assert given - {s for s, _ in ours.fused_away} == (ALWAYS if fused else given)
    pages = np.array([[3, 0, 7], [1, 4, 2], [5, 6, 8]], np.int32)
    vocab = weights.config.vocab
    first = [(0, 3), (0, 1), (0, 2)] if kind == "emulated" else [(0, 70), (0, 1), (0, 130)]
    check(ours, theirs, ragged(rng, vocab, first, pages))
    after = [(n, 1) for _, n in first]
    check(ours, theirs, ragged(rng, vocab, after, pages))
    check(ours, theirs, ragged(rng, vocab, [(after[0][0] + 1, 1)], pages))
    ours.close()


@pytest.mark.parametrize("shared", [99 << 10, 227 << 10])
def test_attention_of_many_tiles(weights, shared):
    """An odd number of tiles, of which a small card's shared memory holds one at a time."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    engine = EngineConfig(context=512, max_sequences=1, chunk=320)
    ours, theirs = open_cuda("cuda", weights, engine), CpuBackend(weights, engine)
    ours._gpu.shared_most = shared
    pages = rng.permutation(8).astype(np.int32)[None]
    for start, stop in ((0, 300), (300, 317), (317, 512)):
        check(ours, theirs, ragged(rng, weights.config.vocab, [(start, stop - start)], pages))
    ours.close()
    theirs.close()
