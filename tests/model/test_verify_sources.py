"""Oracle, transformers, other engines' folders, accuracy and ablation, on the sample model."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import isobit
from isobit.cli import main
from isobit.errors import GateFailed, NothingCompared, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.model.stages import all_stages
from isobit.model.weights import Weights
from isobit.runtime.model import Model
from isobit.verify import accuracy, other_arithmetics, report
from isobit.verify.ablate import Ablation, by_share
from isobit.verify.arithmetic import SpecArithmetic
from isobit.verify.compare import compare
from isobit.verify.faults import ChangedStage, with_backend
from isobit.verify.forward import Run, forward
from isobit.verify.oracle import Oracle
from isobit.verify.trace import ModelRun, record
from isobit.verify.trace_file import Trace
from isobit.verify.verify import open_replay, verify
from tests.helpers.expected import needs
from tests.helpers.synth import Geometry, write_model
from tests.model.test_glm4moe import write as write_glm

IDS = [1138, 550, 1754, 65, 404, 565, 14, 411, 5436, 223, 19, 18]
ALL = frozenset(all_stages(moe=True))


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", "reference") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def oracle(model: Model) -> Oracle:
    return Oracle.of(model.file)


@pytest.fixture(scope="module")
def recorded(model: Model) -> Trace:
    return record(model, IDS)


@pytest.fixture(scope="module")
def ablation(model: Model) -> Ablation:
    return Ablation(Weights.from_file(model.file), [IDS])


def tensors(trace: Trace) -> dict[tuple[str, int | None], np.ndarray]:
    return {key: trace[key] for key in trace.stages()}


@pytest.mark.parametrize("planes", [1, 2])
def test_the_stage_graph_is_the_reference(planes: int, model: Model) -> None:
    """Every stage, attention maps included, bit for bit: replay relies on it."""
    with isobit.load("sample", "reference", activation_bits=8 * planes) as other:
        expected = tensors(record(other, IDS))
    arithmetic = SpecArithmetic(planes)
    got: dict[tuple[str, int | None], Any] = {}
    forward(
        Run(model.graph),
        np.array(IDS, np.int32),
        np.arange(len(IDS), dtype=np.int32),
        lambda run, stage, layer, inputs: run.compute(stage, layer, inputs, arithmetic),
        lambda stage, layer, value: got.__setitem__((stage, layer), value),
        ALL,
    )
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, key
        assert got[key].tobytes() == value.tobytes(), key


def test_tracing_changes_no_bit(model: Model, recorded: Trace) -> None:
    assert recorded["lm_head", None].tobytes() == model.logits(IDS).tobytes()
    assert len(recorded.stages()) == 3 + 8 * 19
    assert {s for s, _ in recorded.stages()} == ALL


@pytest.mark.parametrize("chunk", [1, 5])
def test_chunks_are_put_together(chunk: int, recorded: Trace) -> None:
    with isobit.load("sample", "reference") as other:
        other.engine = isobit.config.EngineConfig(chunk=chunk)
        parts = record(other, IDS)
    assert compare(parts, recorded).identical
    for layer in range(8):
        margin, whole = parts.margin(layer), recorded.margin(layer)
        assert margin is not None
        assert whole is not None
        assert margin.tobytes() == whole.tobytes()


class Interrupted(ModelRun):
    """A run that Ctrl-C ends after some values."""

    def __init__(self, model: Model, after: int) -> None:
        super().__init__(model)
        self._left = after

    def run(self, tokens: Any, chunk: int, stages: Any, emit: Any, *, step: bool = False) -> None:
        def counting(*item: Any) -> None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
            emit(*item)

        super().run(tokens, chunk, stages, counting, step=step)


@pytest.mark.parametrize(
    ("after", "tokens", "stages"),
    [
        (0, 0, 0),
        (40, 5, 40),  # in the first chunk: what there is of it
        (155, 5, 155),  # all of the first chunk
        (155 * 2 + 7, 10, 155),  # the third was begun
    ],
)
def test_ctrl_c_leaves_the_first_tokens(
    after: int, tokens: int, stages: int, recorded: Trace
) -> None:
    kept: list[Trace] = []
    with isobit.load("sample", "reference") as other:
        other.engine = isobit.config.EngineConfig(chunk=5)
        with pytest.raises(KeyboardInterrupt):
            record(Interrupted(other, after), IDS, interrupted=kept.append)
    assert len(kept) == (tokens > 0)
    for trace in kept:
        assert (len(trace.manifest.positions), len(trace.stages())) == (tokens, stages)
        assert trace.manifest.tokens == IDS
        for key in trace.stages():
            whole, got = recorded[key][:tokens], trace[key]
            assert got.tobytes() == whole[..., : got.shape[-1]].tobytes(), key
        if stages == len(recorded.stages()):
            diff = compare(trace, recorded)
            assert diff.identical
            assert diff.tokens == tokens


def test_only_what_was_asked_for(model: Model) -> None:
    trace = record(model, IDS, frozenset({"moe_router_indices", "final_norm"}), range(3, 5))
    assert trace.stages() == [
        ("moe_router_indices", 3),
        ("moe_router_indices", 4),
        ("final_norm", None),
    ]
    z = record(model, IDS, frozenset({"moe_router_logits"}), range(3, 4))["moe_router_logits", 3]
    p = np.sort(np.exp(z.astype(np.float64)), axis=1)[:, ::-1]
    margin = trace.margin(3)
    assert margin is not None
    np.testing.assert_allclose(margin, 1 - p[:, 4] / p[:, 3], rtol=1e-4)


def test_attention_maps_explain_attention(recorded: Trace, model: Model) -> None:
    softmax = recorded["attn_softmax", 2].astype(np.float64)
    assert softmax.shape == (len(IDS), 4, len(IDS))
    np.testing.assert_allclose(softmax.sum(axis=-1), 1, atol=1e-6)
    above = np.triu(np.ones((len(IDS), len(IDS)), bool), 1)
    assert not softmax.transpose(1, 0, 2)[:, above].any()
    v = recorded["qkv_matmul", 2].reshape(len(IDS), -1, model.config.head_dim)[:, 6:]
    weighed = np.einsum("thn,nhd->thd", softmax, v.repeat(2, axis=1))
    np.testing.assert_allclose(
        weighed.reshape(len(IDS), -1), recorded["attention", 2], rtol=0, atol=1e-4
    )


def test_accuracy_against_the_oracle(model: Model, oracle: Oracle) -> None:
    diff = verify(model, oracle, IDS)
    assert diff.accuracy
    found = diff.to_json()
    assert [found["identical"], *(s["identical"] for s in found["stages"])] == [None] * 140
    assert diff.mean_kl is not None
    assert 1e-12 < diff.mean_kl < 1e-6
    own = {s.stage: s.own_error.relative_rms for s in diff.stages if s.own_error is not None}
    assert own["qkv_matmul"] > 1e-6 > own["ffn_norm"] > 0  # only quantised products lose bits


def test_own_errors_are_of_every_chunk(oracle: Oracle) -> None:
    with isobit.load("sample", "cpu") as short:
        short.engine = dataclasses.replace(short.engine, chunk=5)
        diff = verify(short, oracle, IDS)
    for s in diff.stages:
        assert s.own_error is not None, s.where
        assert s.own_error.values == s.distance.values == len(IDS) * math.prod(s.shape[1:])


def test_a_trace_replayed_against_the_oracle_s_has_own_errors_and_no_verdicts(
    recorded: Trace, oracle: Oracle
) -> None:
    theirs = record(oracle, IDS)
    diff = compare(recorded, theirs, replay=open_replay("sample", theirs.manifest))
    own = {s.stage: s.own_error.relative_rms for s in diff.stages if s.own_error is not None}
    assert own["qkv_matmul"] > 1e-6 > own["ffn_norm"] > 0
    assert {s.origin for s in diff.stages} == {None}
    assert not diff.identical
    header, rows = report.table(diff)
    assert header[-1] == "own rel. RMS"
    assert {len(row) for row in rows} == {len(header)}
    assert "furthest off by itself is " in "\n".join(report.summary(diff))


def test_transformers_is_the_oracle_in_float32(model: Model, oracle: Oracle) -> None:
    needs("torch", "torch")
    from isobit.verify import hf  # noqa: PLC0415

    theirs = record(hf.Transformers.of(model.file), IDS)
    ours = record(oracle, IDS)
    diff = compare(theirs, ours)
    assert {s.stage for s in diff.stages} == ALL
    assert diff.router_changed == diff.argmax_changed == 0
    for s in diff.stages:
        if s.stage != "moe_router_indices":
            assert s.distance.relative_rms is not None
            assert s.distance.relative_rms < 1e-5, s.where
    exact = verify(model, hf.Transformers.of(model.file), IDS)
    assert exact.accuracy


@pytest.mark.parametrize("odd", [None, 5])
def test_transformers_first_stage_beyond_float32_rounding(
    odd: int | None,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two recordings and one comparison, which names no stage; one product in bf16, or none."""
    torch = needs("torch", "torch")
    from isobit.verify import hf  # noqa: PLC0415

    monkeypatch.chdir(tmp_path)
    theirs = hf.Transformers.of(model.file)
    if odd is not None:
        product = theirs.model.model.layers[odd].self_attn.o_proj
        monkeypatch.setattr(
            product, "forward", lambda x: x.to(torch.bfloat16).float() @ product.weight.T
        )
    record(theirs, IDS).save("theirs.trace")
    tokens = ["--tokens", ",".join(map(str, IDS))]
    assert main(["trace", "--backend", "cpu", *tokens, "-o", "ours.trace"]) == 0
    capsys.readouterr()
    argv = ["diff", "theirs.trace", "ours.trace", "--replay"]
    assert main([*argv, "--html", "d.html"]) == 1
    out, err = capsys.readouterr()
    page = Path("d.html").read_text("utf-8")
    if odd is None:
        assert "replay: no operation is off by more than float32 rounding explains" in out
        assert "faulty" not in out.partition("| stage")[0]
        assert "float32 rounding explains every operation" in page
    else:
        assert "replay: first beyond float32 rounding: attn_out of layer 5" in out
        assert "1 of 139 stages are" in out
        assert "A's activations are bf16 in attn_out" in out
        assert "faulty: attn_out of layer 5" in err
        assert "Beyond float32 rounding by itself: attn_out of layer 5." in page


def test_accuracy_over_a_text(model: Model, oracle: Oracle) -> None:
    with isobit.load("sample", "reference", activation_bits=8) as coarse_model:
        seen: list[tuple[int, int]] = []
        fine, rough = accuracy.measure(
            [model, coarse_model], oracle, IDS, window=6, progress=lambda *a: seen.append(a)
        )
    assert seen[-1] == (12, 12)
    assert fine.tokens == rough.tokens == 12
    assert fine.token_layers == 8 * 12
    assert fine.predicted == 10  # five in each window
    assert fine.mean_kl < 1e-6
    assert rough.mean_kl > 1e-4
    runs = [oracle.evaluate(IDS[:6]), oracle.evaluate(IDS[6:])]
    log_p = [r.logits - np.log(np.exp(r.logits).sum(axis=1, keepdims=True)) for r in runs]
    nll = -sum(
        p[i, ids[i + 1]] for p, ids in zip(log_p, (IDS[:6], IDS[6:]), strict=True) for i in range(5)
    )
    assert fine.oracle_perplexity == pytest.approx(np.exp(nll / 10))


def test_accuracy_of_a_damaged_model_is_an_error(model: Model, oracle: Oracle) -> None:
    def poison(logits: np.ndarray) -> None:
        logits[1, 7] = np.nan

    faulty = with_backend(model, lambda w, e: ChangedStage(w, e, "lm_head", None, poison))
    with faulty, pytest.raises(GateFailed, match="expected finite logits"):
        accuracy.measure([faulty], oracle, IDS)


def test_accuracy_of_nothing_is_an_error(model: Model, oracle: Oracle) -> None:
    with pytest.raises(NothingCompared):
        accuracy.measure([model], oracle, IDS[:1])


def test_the_oracle_unpacks_some_rows_at_a_time(
    oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = oracle.evaluate(IDS)
    monkeypatch.setattr("isobit.numerics.ops.matmul._UNPACKED", 1000 * 256)
    # 8,192 rows: the last few are fewer
    parts = Oracle(oracle.weights).evaluate(IDS)
    np.testing.assert_allclose(parts.logits, whole.logits, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(parts.experts, whole.experts)


def test_the_oracle_ignores_chunks(oracle: Oracle) -> None:
    whole, parts = [], []
    stages = frozenset({"lm_head", "attn_softmax"})
    oracle.run(IDS, 512, stages, lambda s, _l, _p, v: whole.append((s, v)))
    oracle.run(IDS, 5, stages, lambda s, _l, _p, v: parts.append((s, v)))
    ends = [np.concatenate([v for s, v in run if s == "lm_head"]) for run in (whole, parts)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0, atol=1e-10)


# Ablation


def test_float64_everywhere_is_the_oracle(ablation: Ablation) -> None:
    stages = dict.fromkeys(s for s in ablation.stages if not s.startswith("attn_s"))
    outcome = ablation.try_out(dict.fromkeys(stages, "f64"))
    assert outcome.factor < 0.02
    assert outcome.share > 0.999


def test_nothing_changed_is_the_specification(ablation: Ablation) -> None:
    outcome = ablation.try_out({})
    assert (outcome.factor, outcome.share, outcome.argmax_moved, outcome.sets_moved) == (1, 0, 0, 0)
    assert ablation.try_out({"qkv_matmul": "own"}, layers=[3]).factor == 1


def test_coarser_is_worse_in_order(ablation: Ablation) -> None:
    names = ["int8/256", "int8/32", "bf16", "f16", "int16/256", "int16/32"]
    errors = [ablation.try_out({"moe_expert_out": n}).relative_rms for n in names]
    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] > errors[5]
    assert ablation.try_out({"moe_expert_out": "int8/256"}, [0]).relative_rms < errors[0]


@pytest.mark.parametrize(("planes", "name"), [(1, "int8/256"), (2, "int16 in two planes/256")])
def test_a_ranking_names_the_arithmetic_that_fits(planes: int, name: str, model: Model) -> None:
    fits = Ablation(Weights.from_file(model.file), [IDS], planes).fits([1, 2])
    products = {"qkv_matmul", "attn_out", "moe_expert_gate", "moe_expert_up", "moe_expert_out"}
    assert {stage for stage, f in fits.items() if f.arithmetic == name} >= products
    assert not {"attn_norm", "moe_expert_swiglu", "post_ffn_residual"} & set(fits)


def test_ranking_sorts_by_share_with_pinned_experts(ablation: Ablation) -> None:
    ranked = by_share(ablation.rank(layers=[0, 1]))
    assert {o.name for o in ranked} == set(ablation.stages)
    shares = [o.share for o in ranked]
    assert shares == sorted(shares, reverse=True)
    assert all(o.pinned and o.alone for o in ranked)
    exact = ablation.alone("qkv_matmul", "f64")
    assert exact.share < 1e-6


def test_a_stage_alone_in_another_arithmetic(ablation: Ablation) -> None:
    coarse = [ablation.alone(s, "int8/256") for s in ("moe_expert_out", "moe_router")]
    assert coarse[0].name == "moe_expert_out=int8/256"
    assert coarse[0].share > 100
    # experts that are pinned away are not seen by its rounding
    assert ablation.alone("moe_router", "int16/256").share < coarse[1].share < 1e4
    assert ablation.alone("moe_router_indices", "int8/256").share < 10  # but for ties
    whole = ablation.everything()
    assert (whole.share, whole.alone, whole.factor) == (1, True, 1)


PRODUCTS = {"qkv_matmul", "attn_out", "moe_expert_gate", "moe_expert_up", "moe_expert_out"}
PRODUCTS |= {"lm_head"}
CODE = (
    "def fibonacci(n): return 42\n",
    "import os\nimport sys\n\ndef main():\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n",
)


def test_the_culprits_of_int8_come_first(model: Model) -> None:
    """What is rounded to int8 is every quantised product, and nothing else: of each prompt."""
    weights = Weights.from_file(model.file)
    every = Ablation(weights, [model.tokenize(p) for p in CODE], planes=1)
    ranked = by_share(every.rank())
    assert {o.name for o in ranked[:6]} == PRODUCTS
    assert ranked[0].name == "moe_expert_out"
    assert ranked[0].tokens == sum(len(model.tokenize(p)) for p in CODE)
    for o in ranked[:6]:
        assert min(o.shares) > 0.01
        assert o.uncertainty is not None
        assert o.share > o.uncertainty
    assert max(s for o in ranked[6:] for s in o.shares) < 1e-4
    assert len(ranked[0].shares) == 3


def test_pinned_experts_are_the_oracle_s(model: Model) -> None:
    """With float64 everywhere nothing but the router's own choice could differ."""
    weights = Weights.from_file(model.file)
    ablation = Ablation(weights, [model.tokenize(CODE[0])], planes=1)
    free, pinned = ablation.specification, ablation.pinned_specification()
    assert free.changed_sets > 0
    assert pinned.changed_sets > 0  # said, though not used
    assert pinned.relative_rms < 0.7 * free.relative_rms
    stages = dict.fromkeys((s for s in ablation.stages if not s.startswith("attn_s")), "f64")
    exact = ablation.try_out(stages, pinned=True)
    assert exact.relative_rms < 1e-3 * pinned.relative_rms
    assert exact.share > 0.999


def test_weights_that_do_not_sum_to_one_stay_so_when_pinned(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "m.gguf",
        Geometry(experts_used=3),
        metadata={"qwen3moe.expert_weights_norm": False},
    )
    with isobit.load(path, "reference") as model:
        ablation = Ablation(Weights.from_file(model.file), [[5, 6, 7]])
        assert not model.config.normalise_experts
    free, pinned = ablation.specification, ablation.pinned_specification()
    if not free.changed_sets:
        assert pinned.relative_rms < 2 * free.relative_rms


@pytest.mark.parametrize("kind", ["Air", "big"])
def test_experts_that_a_bias_and_groups_choose_are_pinned(kind: str, tmp_path: Path) -> None:
    """After a dense layer, too."""
    write_glm(tmp_path / "m.gguf", kind)
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        weights = Weights.from_file(file)
        ablation = Ablation(weights, [[5, 6, 7, 8], [9, 10]], planes=1)
        pinned = ablation.pinned_specification()
        stages = [s for s in ablation.stages if not s.startswith("attn_s")]
        assert ablation.try_out(dict.fromkeys(stages, "f64"), pinned=True).share > 0.999
    assert pinned.token_layers == 6 * (weights.config.n_layers - 1)
    assert pinned.relative_rms < 0.2


def test_no_choice_is_blamed_that_a_bias_makes(tmp_path: Path) -> None:
    """Its experts are not the most likely by the logits, on either side."""
    write_glm(tmp_path / "m.gguf", "Air")
    tokens = list(range(5, 205))
    with (
        isobit.load(tmp_path / "m.gguf", "cpu", activation_bits=8) as a,
        isobit.load(tmp_path / "m.gguf", "cpu") as b,
    ):
        found = compare(record(a, tokens), record(b, tokens))
    assert found.router_changed > 0
    assert set(found.router_causes) == {"unknown"}


def test_one_token_can_be_ablated(model: Model) -> None:
    outcome = Ablation(Weights.from_file(model.file), [[17]]).try_out({"attn_softmax": "f64"})
    assert outcome.factor == pytest.approx(1, abs=0.2)
    with pytest.raises(UsageError, match="at least 1"):
        Ablation(Weights.from_file(model.file), [[5], []])


@pytest.mark.parametrize("stage", sorted(ALL - {"embedding"}))
def test_another_order_of_float32_stays_close(stage: str, ablation: Ablation) -> None:
    outcome = ablation.try_out({stage: "f32-reversed"})
    assert 0 < outcome.factor < 1.5
    assert outcome.argmax_moved == 0


@pytest.mark.parametrize("text", ["", "qkv_matmul", "qkv_matmul=f8", "foo=f64", "embedding=f64"])
def test_unknown_stages_and_arithmetics(text: str, ablation: Ablation) -> None:
    with pytest.raises(UsageError, match=r"expected |did you mean "):
        ablation.parse(text)


@pytest.mark.parametrize("layers", [[], [99], range(8, 10)])
def test_a_stage_that_is_in_no_chosen_layer_is_not_found_to_do_nothing(
    layers: Sequence[int], ablation: Ablation
) -> None:
    for call in (
        lambda: ablation.try_out({"qkv_matmul": "f64"}, layers),
        lambda: ablation.try_out({"lm_head": "f64", "qkv_matmul": "f64"}, layers),
        lambda: ablation.alone("qkv_matmul", layers=layers),
    ):
        with pytest.raises(UsageError, match="layers: expected one with qkv_matmul"):
            call()
    with pytest.raises(UsageError, match="expected one with nosuch"):
        ablation.try_out({"nosuch": "f64"})
    assert [o.name for o in ablation.rank(layers=iter(layers))] == ["final_norm", "lm_head"]


def test_roundings() -> None:
    x = np.array([[1.0, 1.00390625, -3.0, 65519.0]], np.float32)

    def rounded(name: str) -> list[float]:
        function = other_arithmetics.rounding(name)
        assert function is not None
        values: list[float] = function(x)[0].tolist()
        return values

    assert rounded("bf16") == [1.0, 1.0, -3.0, 65536.0]  # a tie goes to even
    assert rounded("f16") == [1.0, 1.00390625, -3.0, 65504.0]
    step = np.float32(65519 / 127)
    assert rounded("int8/32") == [0.0, 0.0, 0.0, float(step) * 127]
    assert other_arithmetics.rounding("f64") is None
