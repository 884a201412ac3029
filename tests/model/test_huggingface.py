"""The engine beside ``transformers`` holding the same dequantised weights in float32."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.helpers import passes
from tests.helpers.expected import needs
from tests.helpers.synth import Q4_K_M, Geometry, all_in, write_model
from tests.model import accuracy
from tests.model.accuracy import SAMPLE, Accuracy
from tests.model.oracle import Oracle, OracleRun

SHAPES = {
    "moe, head_dim 64, 16 experts top-4": (
        Geometry(layers=3, heads=8, kv_heads=2, experts=16, experts_used=4),
        Q4_K_M,
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


@dataclass(frozen=True)
class Case:
    """A model and what ``transformers`` makes of some tokens."""

    path: Path
    run: OracleRun
    logits: NDArray[np.float64]
    experts: NDArray[np.int64]


@pytest.fixture(scope="module", params=["sample", *SHAPES])
def case(
    request: pytest.FixtureRequest,
    sample_oracle: Oracle,
    heldout_run: OracleRun,
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    if request.param == "sample":
        path, oracle, run = SAMPLE, sample_oracle, heldout_run.first(512)
    else:
        path = tmp_path_factory.mktemp("model") / "model.gguf"
        geometry, formats = SHAPES[request.param]
        oracle = Oracle(write_model(path, geometry, formats, seed=7))
        run = oracle.run(np.random.default_rng(7).integers(0, geometry.vocab, 200).tolist())
    huggingface = needs("torch", "tests.model.huggingface")
    return Case(path, run, *huggingface.run(huggingface.build(oracle), run.ids.tolist()))


def test_the_oracle_agrees(case: Case) -> None:
    """Two independent programs, equal to float32: neither reads a weight in a wrong role."""
    result = Accuracy.of(case.run, case.logits, case.experts)
    assert result.mean_kl < 1e-9
    assert result.changed_sets <= 1e-3


@pytest.mark.parametrize("backend", passes.BACKENDS)
def test_the_engine_agrees(backend: str, case: Case) -> None:
    experts = passes.Experts()
    ids = case.run.ids.tolist()
    with passes.backend_of(case.path, backend) as b:
        found = passes.run(b, ids, tap=experts, stages=passes.Experts.STAGES).astype(np.float64)
    norms = np.linalg.norm(case.logits, axis=1) * np.linalg.norm(found, axis=1)
    cosine = (case.logits * found).sum(axis=1) / norms
    agree = np.ones(len(ids), bool)
    if case.experts.size:
        agree = ~accuracy.changed(case.experts, experts.ids).any(axis=0)
    print(
        f"{len(ids)} tokens: 1 - cosine: median {1 - np.median(cosine):.1e}, largest with equal "
        f"expert sets {1 - cosine[agree].min():.1e}, of all {1 - cosine.min():.1e}; "
        f"{np.count_nonzero(~agree)} positions with other experts"
    )
    assert np.median(cosine) >= 0.99999
    assert cosine[agree].min() >= 0.999
    assert agree.mean() > 0.95
