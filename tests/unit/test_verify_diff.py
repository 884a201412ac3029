"""Traces in files, and what comparing them finds, on made-up traces."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from isobit.errors import FileRefused, NothingCompared, UsageError
from isobit.model.stages import all_stages
from isobit.verify import blame, report
from isobit.verify.compare import compare
from isobit.verify.trace_file import Manifest, Trace, graph_order, parse_layers, parse_stages

TOKENS = [5, 6, 7, 8]
MANIFEST = Manifest(tokens=TOKENS, positions=[0, 1, 2, 3], backend="made up", numerics=1)


def made(layers: int = 5, manifest: Manifest = MANIFEST) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    t = len(manifest.positions)
    out = {"embedding": rng.standard_normal((t, 6)).astype(np.float32)}
    for i in range(layers):
        out[f"layers.{i}.attn_norm"] = rng.standard_normal((t, 6)).astype(np.float32)
        z = rng.standard_normal((t, 4)).astype(np.float32)
        out[f"layers.{i}.moe_router_logits"] = z
        out[f"layers.{i}.moe_router_indices"] = np.argsort(-z, axis=1)[:, :2].astype(np.int32)
    out["lm_head"] = rng.standard_normal((t, 9)).astype(np.float32)
    return out


def pair(change: Callable[[dict[str, Any]], None], a: Manifest = MANIFEST) -> tuple[Trace, Trace]:
    tensors = {k: v.copy() for k, v in made().items()}
    change(tensors)
    return Trace(a, tensors), Trace(MANIFEST, made())


def nothing(_: dict[str, Any]) -> None:
    pass


def test_equal_traces_are_identical() -> None:
    diff = compare(*pair(nothing))
    assert diff.identical
    lines = report.summary(diff)
    assert lines[0].startswith("identical: 17 stages")
    assert "NaN" not in lines[0]
    assert lines[1] == "A is made up; B is made up"


def test_the_first_in_graph_order() -> None:
    def change(t: dict[str, Any]) -> None:
        t["layers.3.attn_norm"][2, 1] += 1
        t["layers.1.moe_router_logits"][1, 0] += 0.01
        t["lm_head"][0, t["lm_head"][0].argmin()] += 9

    diff = compare(*pair(change))
    assert diff.first is not None
    assert (diff.first.stage, diff.first.layer) == ("moe_router_logits", 1)
    assert diff.first.distance.first_position == 1
    assert [s.where for s in diff.stages if not s.distance.identical][1:] == [
        "attn_norm of layer 3",
        "lm_head",
    ]
    assert diff.argmax_changed == 1
    assert diff.mean_kl is not None
    assert diff.mean_kl > 0.1


@pytest.mark.parametrize(("off", "found"), [(1.0, [2]), (2.2e-3, [2]), (1.8e-3, []), (1e-4, [])])
def test_layers_that_stand_apart(off: float, found: list[int]) -> None:
    def change(t: dict[str, Any]) -> None:
        for i in range(5):
            t[f"layers.{i}.attn_norm"] *= np.float32(1 + (off if i == 2 else 1e-3))
            t[f"layers.{i}.moe_router_indices"][i % 2] += 1

    apart = compare(*pair(change)).apart()
    assert [(s.stage, s.layer) for s, _ in apart] == [("attn_norm", i) for i in found]
    assert [times for _, times in apart] == [pytest.approx(off / 1e-3, rel=1e-2)] * len(found)


@pytest.mark.parametrize(
    ("gap", "logits_change", "elsewhere", "chosen", "cause"),
    [
        (1e-4, 2e-4, 0.0, [0, 2], "near-tie"),
        (1e-4, 2e-4, 0.009, [0, 2], "near-tie"),
        (1e-4, 2e-4, 0.011, [0, 2], "error"),
        (0.5, 1.0, 0.0, [0, 2], "error"),
        (1e-4, 0.0, 0.0, [0, 3], "selection"),
        (1e-4, 0.0, 0.0, [0, 0], "selection"),
    ],
)
def test_why_experts_changed(
    gap: float, logits_change: float, elsewhere: float, chosen: list[int], cause: str
) -> None:
    z = np.array([[3, 2, 2 - gap, 1]] * 2, np.float32)

    def trace(logits: np.ndarray, ids: list[int]) -> Trace:
        manifest = replace(MANIFEST, positions=[0, 1])
        both = np.array([[0, 1], ids], np.int32)
        return Trace(
            manifest, {"layers.0.moe_router_logits": logits, "layers.0.moe_router_indices": both}
        )

    moved = z.copy()
    moved[1, 2] += logits_change
    moved[1, 0] += elsewhere
    diff = compare(trace(moved, chosen), trace(z, [0, 1]))
    assert (diff.router_rows, diff.router_changed) == (2, 1)
    change = diff.router[0]
    assert (change.layer, change.position, change.cause) == (0, 1, cause)
    assert change.only_b == [1]
    assert change.drift == pytest.approx(max(logits_change, elsewhere), abs=1e-6)
    assert change.margin_b == pytest.approx(1 - np.exp(-gap), rel=1e-2)


def test_experts_are_measured_with_the_same_expert() -> None:
    ids = np.array([[0, 1], [2, 3]], np.int32)
    gate = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    swapped, other = ids[:, ::-1].copy(), ids.copy()
    other[1, 1] = 7
    manifest = replace(MANIFEST, positions=[0, 1])

    def trace(chosen: np.ndarray, values: np.ndarray) -> Trace:
        names = ("layers.0.moe_router_indices", "layers.0.moe_expert_gate")
        return Trace(manifest, dict(zip(names, (chosen, values), strict=True)))

    reordered = compare(trace(swapped, gate[:, ::-1].copy()), trace(ids, gate))
    assert [s.distance.identical for s in reordered.stages] == [False, True]
    assert reordered.router_reordered == 2
    changed = gate.copy()
    changed[1, 1] = 1e6
    left_out = compare(trace(other, changed), trace(ids, gate))
    assert left_out.stages[1].distance.values == 9
    assert left_out.stages[1].distance.identical
    assert not left_out.identical


@pytest.mark.parametrize(
    ("change", "manifest", "complaint"),
    [
        (lambda t: t.pop("layers.2.attn_norm"), MANIFEST, "attn_norm of layer 2: expected in both"),
        (lambda t: t.pop("lm_head"), MANIFEST, "lm_head: expected in both traces, missing in A"),
        (lambda t: t.clear(), MANIFEST, "expected in both"),
        (nothing, replace(MANIFEST, tokens=[5, 6, 7, 9]), "A has 9 at position 3, B 8"),
        (nothing, replace(MANIFEST, tokens=[*TOKENS, 9]), "got different ones: A has 5, B 4"),
        (nothing, replace(MANIFEST, positions=[]), "none in common"),
        (lambda t: t.update(lm_head=np.ones((4, 8), np.float32)), MANIFEST, "one shape"),
        (
            lambda t: t.update(lm_head=np.ones((3, 12), np.float32)),
            MANIFEST,
            "of 4 tokens, got shape (3, 12)",
        ),
        (
            lambda t: t.update(lm_head=np.ones((), np.float32)),
            MANIFEST,
            "of 4 tokens, got shape ()",
        ),
    ],
)
def test_nothing_passes_vacuously(
    change: Callable[[dict[str, Any]], None], manifest: Manifest, complaint: str
) -> None:
    with pytest.raises(NothingCompared, match=re.escape(complaint)):
        compare(*pair(change, manifest))


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 2)])
def test_margins_of_another_shape(shape: tuple[int, ...]) -> None:
    def change(t: dict[str, Any]) -> None:
        t["layers.1.moe_router_margin"] = np.zeros(shape, np.float32)

    for a, b in (pair(change), pair(change)[::-1]):
        with pytest.raises(NothingCompared, match=r"moe_router_margin of layer 1: .* \(4,\), got"):
            compare(a, b)


@pytest.mark.parametrize("name", ["layers.01.attn_norm", "layers.00000.attn_norm"])
def test_a_tensor_has_one_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    Trace(MANIFEST, made() | {name: np.zeros((4, 6), np.float32)}).save(path)
    with pytest.raises(FileRefused, match=name):
        Trace.load(path)


def test_empty_selections_are_errors() -> None:
    a, b = pair(nothing)
    with pytest.raises(NothingCompared, match="attn_out"):
        compare(a, b, stages=frozenset({"attn_out"}))
    with pytest.raises(NothingCompared, match="attn_norm"):
        compare(a, b, stages=frozenset({"attn_norm"}), layers=range(8, 9))
    with pytest.raises(NothingCompared, match="none to compare"):
        compare(Trace(MANIFEST, {}), Trace(MANIFEST, {}))


def test_a_layer_that_nobody_recorded_is_not_compared() -> None:
    with pytest.raises(NothingCompared, match="layer 5: expected in both traces, found in none"):
        compare(*pair(nothing), layers=range(4, 7))
    diff = compare(*pair(nothing), layers=range(4, 5))
    assert {s.layer for s in diff.stages} == {None, 4}


def test_values_of_other_shapes_are_not_compared() -> None:
    wide = {"layers.0.attention": np.zeros((4, 2, 3), np.float32)}
    tall = {"layers.0.attention": np.zeros((4, 3, 2), np.float32)}
    flat = {"layers.0.attention": np.zeros((4, 6), np.float32)}  # of an engine that says none
    with pytest.raises(NothingCompared, match=r"got \(4, 2, 3\) and \(4, 3, 2\)"):
        compare(Trace(MANIFEST, wide), Trace(MANIFEST, tall))
    assert compare(Trace(MANIFEST, flat), Trace(MANIFEST, tall)).identical


@pytest.mark.parametrize("types", [("f4", "f4"), ("f4", "f8"), ("f8", "f4"), ("f8", "f8")])
def test_zeros_of_two_signs_and_nan_differ_in_every_type(types: tuple[str, str]) -> None:
    def found(x: float, y: float) -> bool:
        a, b = (np.full((4, 2), v, t) for v, t in zip((x, y), types, strict=True))
        one, other = (Trace(MANIFEST, {"lm_head": v}) for v in (a, b))
        return compare(one, other).identical

    assert found(0.0, 0.0)
    assert not found(0.0, -0.0)
    assert not found(np.nan, -np.nan)
    assert not found(np.nan, np.inf)


def test_a_cosine_that_is_no_number_is_below_every_gate() -> None:
    """float64 sums overflow: NaN, which the next comparison's cosine took away."""
    huge, fine = (
        compare(*(Trace(MANIFEST, {"layers.0.post_ffn_residual": x}) for x in pair))
        for pair in (
            (np.full((4, 2), 1e200), np.full((4, 2), 2e200)),
            (np.ones((4, 2)), np.ones((4, 2))),
        )
    )
    assert np.isnan(huge.stages[0].distance.cosine)
    for diffs in ([huge], [huge, fine], [fine, huge]):
        assert blame.gate(diffs, 0.99).below == [0]


def test_two_runs_that_are_broken_alike_are_said_to_be() -> None:
    tensors = made()
    tensors["lm_head"][1, 2:4] = np.nan
    lines = report.summary(compare(Trace(MANIFEST, tensors), Trace(MANIFEST, tensors)))
    assert lines[0].endswith("4 tokens; 2 values are NaN or infinite")


def test_an_expert_is_compared_with_the_same_expert_of_its_own_layer(
    rng: np.random.Generator,
) -> None:
    ids = np.array([rng.permutation(9)[:4] for _ in range(4)], np.int32)
    order = np.argsort(rng.random((4, 4)), axis=1)
    out = rng.standard_normal((4, 4, 3)).astype(np.float32)
    other = np.take_along_axis(ids, order, axis=1)
    other[2, rng.integers(4)] = 9
    moved = np.take_along_axis(out, order[..., None], axis=1)
    a = {"layers.0.moe_router_indices": ids, "layers.0.moe_expert_out": out}
    b = {"layers.0.moe_router_indices": other, "layers.0.moe_expert_out": moved}
    diff = compare(Trace(MANIFEST, a), Trace(MANIFEST, b))
    assert [s.distance.differing == 0 for s in diff.stages] == [False, True]
    assert diff.stages[1].distance.values == 15 * 3  # all but the one that only one of them took
    # layer 1 says nothing of its experts: none of them is left out for what layer 0 chose
    a |= {"layers.1.moe_expert_out": out}
    b |= {"layers.1.moe_expert_out": out + np.float32(1)}
    diff = compare(Trace(MANIFEST, a), Trace(MANIFEST, b))
    assert diff.stages[2].distance.values == diff.stages[2].distance.differing == 16 * 3


def test_one_token_is_compared_and_said_to_be_one() -> None:
    one = replace(MANIFEST, tokens=[5], positions=[0])
    tensors = {"embedding": np.ones((1, 2), np.float32)}
    diff = compare(Trace(one, tensors), Trace(one, tensors))
    assert diff.identical
    assert "note: one token: attention is trivial" in "\n".join(report.summary(diff))


def test_stages_a_backend_does_not_hold_are_named_and_not_compared() -> None:
    a, b = pair(nothing, replace(MANIFEST, not_recorded=["attn_scores"]))
    b = Trace(MANIFEST, made() | {"layers.0.attn_scores": np.ones((4, 1, 4), np.float32)})
    diff = compare(a, b)
    assert diff.not_compared == ["attn_scores"]
    assert any("attn_scores" in line for line in report.summary(diff))
    with pytest.raises(NothingCompared, match="attn_scores of layer 0"):
        compare(Trace(MANIFEST, made()), b)


def test_rows_of_the_same_positions_are_compared() -> None:
    """A trace of the last token alone, as other engines write them."""
    last = {k: v[-1:].copy() for k, v in made().items()}
    last["lm_head"][0, 3] += 1
    diff = compare(Trace(replace(MANIFEST, positions=[3]), last), Trace(MANIFEST, made()))
    assert diff.first is not None
    assert (diff.first.stage, diff.first.distance.first_position) == ("lm_head", 3)
    assert ", 1 of 4 tokens; the first is lm_head" in report.summary(diff)[0]
    assert report.summary(compare(*pair(nothing)))[0].endswith(", 4 tokens")


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    trace = Trace(MANIFEST, made())
    trace.save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert loaded.manifest == MANIFEST
    assert loaded.stages() == trace.stages() == sorted(trace.stages(), key=graph_order)
    assert loaded.stages()[0] == ("embedding", None)
    assert loaded.stages()[-1] == ("lm_head", None)
    assert compare(loaded, trace).identical


def damaged(tmp_path: Path) -> dict[str, Path]:
    good = tmp_path / "good"
    Trace(MANIFEST, made()).save(good)
    data = good.read_bytes()
    files = {
        "empty": b"",
        "cut": data[: len(data) // 2],
        "header": b"\xff" * 8 + data[8:],
        "text": b"a trace, really",
        "pickle": b"\x80\x04K\x01.",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    tensors = {"embedding": np.ones((4, 2), np.float32)}
    save_file(tensors, tmp_path / "no manifest")
    manifest = json.loads(MANIFEST.to_json())
    for name, change in {
        "format": {"format": 99},
        "tokens": {"tokens": ["x"]},
        "negative": {"positions": [-1]},
        "beyond": {"positions": [0, 4]},
        "twice": {"positions": [1, 1]},
        "planes": {"activation_bits": "16"},
        "three planes": {"activation_bits": 24},
        "silent": {"not_recorded": ["attn_scores", "attn_norm"]},
    }.items():
        save_file(tensors, tmp_path / name, {"isobit": json.dumps(manifest | change)})
    save_file(tensors, tmp_path / "nested", {"isobit": "[" * 100000})
    save_file(
        {"layers.0.foo": tensors["embedding"]}, tmp_path / "unknown", {"isobit": MANIFEST.to_json()}
    )
    names = [
        *files,
        "no manifest",
        "format",
        "tokens",
        "negative",
        "beyond",
        "twice",
        "planes",
        "three planes",
        "silent",
        "nested",
        "unknown",
    ]
    return {name: tmp_path / name for name in names} | {"absent": tmp_path / "absent"}


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    for name, path in damaged(tmp_path).items():
        with pytest.raises(FileRefused) as caught:
            Trace.load(path)
        assert str(path) in str(caught.value), name
        assert "\n" not in str(caught.value)


def test_types_that_a_trace_never_has_are_refused(tmp_path: Path) -> None:
    save_file(
        {"embedding": np.ones((4, 2), np.int8)}, tmp_path / "t", {"isobit": MANIFEST.to_json()}
    )
    with pytest.raises(FileRefused, match="expected F32, F64 or I32, got int8"):
        Trace.load(tmp_path / "t")["embedding", None]


def test_stage_and_layer_arguments() -> None:
    assert parse_stages("attn_norm, lm_head", all_stages(moe=True)) == {"attn_norm", "lm_head"}
    assert parse_stages("all", all_stages(moe=False)) == frozenset(all_stages(moe=False))
    with pytest.raises(UsageError, match=r"'ffn_gate'; expected all or some of embedding, attn_"):
        parse_stages("ffn_gate", all_stages(moe=True))
    assert parse_layers("2..4", 8) == range(2, 5)
    assert parse_layers("7", 8) == range(7, 8)
    assert parse_layers("all", 8) == range(8)
    for text in ("8", "4..2", "-1", "a..b", "1..", "..3", "1.5", "", "²"):
        with pytest.raises(UsageError, match=r"within 0\.\.7"):
            parse_layers(text, 8)


def test_the_page_is_self_contained_and_escapes() -> None:
    hostile = replace(MANIFEST, device="</script><script>alert(1)</script>", model="<img src=x>")
    a, b = pair(lambda t: t["lm_head"].__setitem__((0, 0), np.nan), hostile)
    page = report.html(compare(a, b, histograms=True))
    assert "alert(1)" in page
    assert page.count("<script") == 1
    assert "<img" not in page
    for address in re.findall(r"(?:https?:)?//[\w.]+", page):
        pytest.fail(f"the page refers to {address}")
    data = re.search(r"const D = (\{.*\});\n", page)
    assert data is not None
    values = json.loads(data[1])
    assert sum(values["stages"][0]["histogram"]["a"]) == 24
    assert values["first"] == {"stage": "lm_head", "layer": None}


def test_the_page_has_the_answer_tokens_and_where_each_parts() -> None:
    def change(t: dict[str, Any]) -> None:
        t["layers.0.attn_norm"][2] += 1
        t["layers.0.moe_router_logits"][1:] += 1
        t["layers.0.moe_router_logits"][3] = np.nan  # has no margin to show
        t["lm_head"][3] *= 2

    diff = compare(*pair(change), histograms=True)
    assert [position for layer, position, *_ in diff.margins if layer == 0] == [0, 1, 2]
    page = report.html(diff, lambda token: repr(f"t{token}\n"), ("<a>", "b"))
    found = re.search(r"const D = (\{.*\});\n", page)
    assert found is not None
    data = json.loads(found[1])
    assert data["answer"].startswith("The runs part at attn_norm of layer 0, position 2. Nothing")
    assert sorted(data["parted"]) == [
        [0, 1, "moe_router_logits"],
        [0, 2, "attn_norm"],
        [0, 3, "moe_router_logits"],
    ]
    kl = data["kl"]["by_position"]
    assert [position for position, _ in kl] == [0, 1, 2, 3]
    assert [value > 0 for _, value in kl] == [False, False, False, True]
    assert max(value for _, value in kl) == data["kl"]["max"]
    assert data["names"] == ["<a>", "b"]
    assert data["texts"][str(diff.a.tokens[0])] == repr(f"t{diff.a.tokens[0]}\n")
    assert "<a>" not in page
    same = compare(*pair(nothing), histograms=True)
    assert report.answer(same).startswith("Identical: every bit of ")


def test_the_answer_names_what_is_faulty_and_its_layers_together() -> None:
    diff = compare(*pair(lambda t: t["layers.0.attn_norm"].__setitem__(0, 7)))
    first, second = diff.stages[1], diff.stages[2]
    diff.stages = [
        replace(s, layer=layer, origin="faulty") for s in (first, second) for layer in (0, 1, 3)
    ] + [replace(diff.stages[-1], origin="faulty"), replace(first, origin="propagated")]
    diff.stages[0].distance.differing = 1
    assert report.answer(diff) == (
        f"Wrong by itself: {first.stage} and {second.stage} of layers 0-1, 3; lm_head. 1 other "
        "stage only passes an error on."
    )


def test_json_has_every_stage() -> None:
    def change(t: dict[str, Any]) -> None:
        t["layers.0.attn_norm"][0, 0] = np.inf

    out = json.loads(json.dumps(compare(*pair(change)).to_json(), allow_nan=False))
    assert len(out["stages"]) == 17
    assert out["identical"] is False
    assert out["stages"][1]["nonfinite_a"] == 1


def test_logits_that_are_no_numbers_are_counted_and_not_averaged() -> None:
    def change(t: dict[str, Any]) -> None:
        t["lm_head"][1, 2] = np.nan
        t["lm_head"][3] = 0
        t["lm_head"][3, 8] = 99

    diff = compare(*pair(change))
    assert (diff.logit_rows, diff.nonfinite_rows) == (3, 1)
    assert [c.position for c in diff.argmax] in ([3], [])
    assert diff.mean_kl == pytest.approx(diff.kl_sum / 3)
    assert diff.kl_sum > 0.1
    lines = report.summary(diff)
    assert lines[0].endswith(" without 1 and 0 values that are NaN or infinite")
    assert "next token: logits with NaN or infinity at 1 positions" in lines

    def poison(t: dict[str, Any]) -> None:
        t["lm_head"][:, 0] = np.inf

    diff = compare(*pair(poison))
    assert (diff.logit_rows, diff.nonfinite_rows, diff.mean_kl) == (0, 4, None)
    assert diff.to_json()["kl"] == {"mean": None, "max": None, "by_position": []}


def test_table_rows() -> None:
    diff = compare(*pair(lambda t: t["layers.3.attn_norm"].__setitem__((0, 0), 9)))
    header, rows = report.table(diff)
    assert [r[0] for r in rows] == [
        "embedding",
        "attn_norm",
        "moe_router_logits",
        "moe_router_indices",
        "lm_head",
    ]
    assert rows[1][:3] == ["attn_norm", "3", "1 of 120"]
    assert len(report.table(diff, every=True)[1]) == 17
    assert all(len(r) == len(header) for r in rows)
