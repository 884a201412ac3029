"""`--against hf`: transformers' model of every architecture's file, stage by stage."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from isobit.errors import BackendUnavailable
from isobit.model.checkpoint import open_model
from isobit.model.weights import Weights
from isobit.verify.compare import compare
from isobit.verify.oracle import Oracle
from isobit.verify.trace import record
from tests.helpers.expected import needs
from tests.helpers.random_file import RandomFile
from tests.model import (
    test_checkpoint,
    test_gemma,
    test_glm4moe,
    test_gpt_oss,
    test_granite,
    test_llama,
    test_minimax,
    test_olmoe,
    test_qwen3_variants,
    test_qwen3next,
)

IDS = np.random.default_rng(4).integers(0, 96, 75).tolist()  # more than a window sees
_SCALED = {"attn_scaled", "ffn_scaled"}
_EXPERTS = {f"moe_expert_{x}" for x in ("gate", "up", "swiglu", "out")}
_ROUTER = {"moe_router", "moe_router_indices", "moe_router_scores"}
_DELTA = {f"delta_{x}" for x in ("beta", "conv", "decay", "k", "q")}
MADE: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "gemma3": (lambda p: test_gemma.write(p, "gemma3"), set()),
    "gemma4": (
        lambda p: test_gemma.write(p, "gemma4"),
        {"ffn_added", "moe_expert_out", "moe_router"},
    ),
    "glm4moe": (
        lambda p: test_glm4moe.write(p, "big"),
        {*_EXPERTS, *_ROUTER, "moe_ffn_out"},
    ),
    "gpt-oss": (test_gpt_oss.write, _EXPERTS),
    "granite": (lambda p: test_granite.write(p, "Granite"), {*_SCALED, "final_norm"}),
    "granitemoe": (
        lambda p: test_granite.write(p, "GraniteMoeShared"),
        {*_SCALED, "final_norm", "ffn_with_shared", "shared_expert_gate", "shared_expert_up"},
    ),
    "llama": (lambda p: test_llama.write(p, "llama3"), set()),
    "minimax-m2": (lambda p: test_minimax.write(p, "M2"), {*_EXPERTS, *_ROUTER}),
    "mixtral": (lambda p: test_llama.write(p, "mixtral"), set()),
    "olmoe": (lambda p: test_olmoe.write(p, "several"), set()),
    "qwen2moe": (lambda p: test_checkpoint.written("qwen2_moe", p), set()),
    "qwen3moe": (lambda p: test_qwen3_variants.write(p, "fused"), set()),
    "qwen3, yarn": (lambda p: test_qwen3_variants.write(p, "yarn"), set()),
    "qwen35moe": (lambda p: test_checkpoint.written("qwen3_5_moe", p), _DELTA),
    "qwen3next": (test_qwen3next.write, {*_DELTA, "delta_in"}),
}
"""What writes a file or folder, and the stages that transformers has no place for."""


@pytest.mark.parametrize("name", MADE)
def test_stages_are_the_oracles(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 beside float64. The weights are the same every time: where two experts are as good
    as equal, a token may take the other."""
    needs("torch", "torch")
    needs("transformers", "transformers")
    from isobit.verify import hf  # noqa: PLC0415

    monkeypatch.setattr(RandomFile, "seed", 4)
    write, left_out = MADE[name]
    write(tmp_path / "m")
    with open_model(tmp_path / "m") as file:
        theirs, oracle = hf.Transformers.of(file), Oracle.of(file)
        names = frozenset(theirs.graph.names)
        diff = compare(record(theirs, IDS), record(oracle, IDS, stages=names))
    assert set(oracle.graph.names) - names == left_out
    assert diff.router_changed == 0
    for stage in diff.stages:
        if stage.stage != "moe_router_indices":
            assert stage.distance.relative_rms is not None
            assert stage.distance.relative_rms < 5e-5, stage.where


def test_what_transformers_would_not_compute_is_refused(tmp_path: Path) -> None:
    needs("torch", "torch")
    needs("transformers", "transformers")
    from isobit.verify import hf  # noqa: PLC0415

    def refused(weights: Weights, what: str) -> None:
        with pytest.raises(BackendUnavailable, match=rf"^hf: {what}, got [^\n]*$"):
            hf.build(weights)

    test_qwen3_variants.write(tmp_path / "m", "fused")
    with open_model(tmp_path / "m") as file:
        weights = Weights.from_file(file)
        other = replace(weights.config, architecture="unheard_of")
        refused(replace(weights, config=other), "expected one of gemma3, .*")
        scale = replace(weights.graph.weights["output_norm.weight"], name="blk.0.attn_q.scale")
        tensors = {**file.tensors, scale.name: file.tensors["output_norm.weight"]}
        changed = SimpleNamespace(tensors=tensors, data=file.data)
        graph = weights.graph.with_weights({"output_norm.weight": scale})
        place = "blk.0.attn_q.scale: expected a place in Qwen3MoeForCausalLM"
        refused(replace(weights, graph=graph, file=changed), place)
        del tensors[scale.name], tensors["output_norm.weight"]
        norm = "model.norm.weight of Qwen3MoeForCausalLM: expected in the file"
        refused(replace(weights, graph=graph, file=changed), norm)
        tensors["blk.1.attn_qkv.bias"] = file.tensors["output_norm.weight"]
        refused(replace(weights, file=changed), "expected biases of q, k and v apart")
