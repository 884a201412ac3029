"""What earlier versions wrote stays readable, and is still what is computed.

``trace-2026-11.safetensors``: ``isobit trace --tokens 1138,550,1754 --backend reference --stages
embedding,moe_router_indices,attn_softmax,final_norm --layers 0..1``; ``receipt-2026-11.json``:
``isobit run --tokens 1138,550,1754 -n 3 --temperature 0.8 --seed 3 --backend cpu -c 64 --receipt``;
both by the version of commit 6e6f9d2. Older receipts: test_verify_receipt.py.
"""

from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.contracts.evidence import Evidence
from isobit.verify.receipt import Receipt, replay
from isobit.verify.trace import ModelRun, record
from isobit.verify.trace_file import Trace

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
EVIDENCE = sorted(ROOT.glob("contracts/evidence/*/*.json"))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_trace_of_an_earlier_version_is_what_is_computed(backend: str) -> None:
    old = Trace.load(DATA / "trace-2026-11.safetensors")
    assert old.manifest.tokens == [1138, 550, 1754]
    stages = {stage for stage, _ in old.stages()}
    assert stages == {"embedding", "moe_router_indices", "attn_softmax", "final_norm"}
    with isobit.load("sample", backend, context=64) as model:
        held = stages if backend == "reference" else stages - model.graph.on_request
        new = record(ModelRun(model), old.manifest.tokens, stages=frozenset(held))
    compared = [key for key in old.stages() if key[0] in held]
    assert len(compared) == (6 if backend == "reference" else 4)
    for key in compared:
        assert old[key].tobytes() == new[key].tobytes(), key


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_receipt_of_an_earlier_version_replays(backend: str) -> None:
    receipt = Receipt.load(DATA / "receipt-2026-11.json")
    with isobit.load("sample", backend, context=64) as model:
        assert replay(receipt, model) is None
        assert len(receipt.tokens) == 3
        receipt.tokens[1] = type(receipt.tokens[1])(
            **vars(receipt.tokens[1]) | {"logits": receipt.tokens[0].logits}
        )
        assert replay(receipt, model) is not None


@pytest.mark.parametrize("path", EVIDENCE, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_committed_evidence_is_readable(path: Path) -> None:
    evidence = Evidence.load(path)
    assert evidence.results
    assert np.isin([r.outcome for r in evidence.results], ["passed", "not run"]).all()


def test_there_is_evidence() -> None:
    assert len(EVIDENCE) >= 6
