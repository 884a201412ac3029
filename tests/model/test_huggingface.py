"""The engine beside ``transformers`` holding the same dequantised weights in float32."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers import passes
from tests.helpers.synth import Geometry, all_in, write_model
from tests.model import accuracy, huggingface
from tests.model.accuracy import SAMPLE, Accuracy
from tests.model.oracle import Oracle

SHAPES = {
    "moe, head_dim 64, 16 experts top-4": (
        Geometry(layers=3, heads=8, kv_heads=2, experts=16, experts_used=4),
        {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K", "ffn_gate_inp": "F32"},
    ),
    "moe, wide heads, 12 heads in 4 groups, top-1, F16": (
        Geometry(heads=12, kv_heads=4, head_dim=128, experts=5, experts_used=1, rope_base=1e4),
        all_in("F16"),
    ),
    "moe, widths no multiple of 256, one key-value head": (
        Geometry(hidden=96, heads=3, kv_heads=1, head_dim=32, ffn=160),
        all_in("Q8_0", router="BF16"),
    ),
    "dense, tied": (Geometry(experts=0, heads=12, kv_heads=4, tied=True), all_in("Q5_K")),
    "dense, untied": (Geometry(experts=0, ffn=512, head_dim=128), all_in("Q4_0")),
}


def compare(
    path: Path, oracle: Oracle, ids: list[int], backend: str
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Cosine of the logits at every position, and where all layers chose the same experts."""
    expected, their_experts = huggingface.run(huggingface.build(oracle), ids)
    experts = passes.Experts()
    with passes.backend_of(path, backend) as b:
        logits = passes.run(b, ids, tap=experts, stages=passes.Experts.STAGES)
    found = logits.astype(np.float64)
    norms = np.linalg.norm(expected, axis=1) * np.linalg.norm(found, axis=1)
    cosine = (expected * found).sum(axis=1) / norms
    agree = np.ones(len(ids), bool)
    if their_experts.size:
        agree = ~accuracy.changed(their_experts, experts.ids).any(axis=0)
    print(
        f"{len(ids)} tokens: 1 - cosine: median {1 - np.median(cosine):.1e}, largest with equal "
        f"expert sets {1 - cosine[agree].min():.1e}, of all {1 - cosine.min():.1e}; "
        f"{np.count_nonzero(~agree)} positions with other experts"
    )
    return cosine, agree


def check(cosine: NDArray[np.float64], agree: NDArray[np.bool_]) -> None:
    assert np.median(cosine) >= 0.99999
    assert cosine[agree].min() >= 0.999
    assert agree.mean() > 0.95


@pytest.mark.parametrize("backend", passes.BACKENDS)
def test_sample(backend: str, sample_oracle: Oracle, heldout: list[int]) -> None:
    check(*compare(SAMPLE, sample_oracle, heldout[:512], backend))


@pytest.mark.parametrize("backend", passes.BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes(name: str, backend: str, tmp_path: Path) -> None:
    geometry, formats = SHAPES[name]
    path = write_model(tmp_path / "model.gguf", geometry, formats, seed=7)
    ids = np.random.default_rng(7).integers(0, geometry.vocab, 200).tolist()
    check(*compare(path, Oracle(path), ids, backend))


def test_the_oracle_is_transformers_in_float64(
    sample_oracle: Oracle, heldout: list[int], tmp_path: Path
) -> None:
    """Two independent programs agree to float32, so that neither reads a weight in a wrong role."""
    moe, dense = SHAPES["moe, head_dim 64, 16 experts top-4"], SHAPES["dense, tied"]
    sources = [
        (sample_oracle, heldout[:200]),
        (Oracle(write_model(tmp_path / "moe.gguf", *moe)), list(range(200))),
        (Oracle(write_model(tmp_path / "dense.gguf", *dense)), list(range(200))),
    ]
    for oracle, ids in sources:
        run = oracle.run(ids)
        logits, experts = huggingface.run(huggingface.build(oracle), ids)
        result = Accuracy.of(run, logits, experts)
        assert result.mean_kl < 1e-9
        assert result.changed_sets <= 1e-3
