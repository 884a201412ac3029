"""Receipts: written by a generation, computed again, and refused when they are not true."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import isobit
from isobit.errors import FileRefused, IsobitError, NothingCompared, UsageError, shown
from isobit.runtime.model import Model
from isobit.verify.faults import ChangedStage, one_ulp, with_backend
from isobit.verify.receipt import Difference, Receipt, Recorder, replay
from isobit.verify.receipt_file import receipts_in

FORMAT_1 = Path(__file__).parents[1] / "data/receipt-format-1.json"
TODAY = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": []}
PROMPT = [1138, 550, 1754, 65, 404]


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    with isobit.load("sample", "reference") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def recorder(model: Model) -> Recorder:
    recorder = Recorder()
    done = model.generate(PROMPT, max_tokens=9, temperature=0.9, seed=11, watch=recorder)
    assert [t.token for t in recorder.receipt().tokens] == done.token_ids
    return recorder


def test_replays_identically(model: Model, recorder: Recorder, tmp_path: Path) -> None:
    recorder.receipt().save(tmp_path / "r.json")
    receipt = Receipt.load(tmp_path / "r.json")
    assert receipt == recorder.receipt()
    assert receipt.sampling["seed"] == 11
    assert replay(receipt, model) is None


def test_every_setting_replays(model: Model, tmp_path: Path) -> None:
    recorder = Recorder()
    model.generate(
        PROMPT,
        max_tokens=9,
        temperature=1.3,
        top_k=300,
        top_p=0.95,
        min_p=0.001,
        repeat_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.1,
        logit_bias={404: 2.5, 7: -100},
        seed=-5,
        watch=recorder,
    )
    recorder.receipt().save(tmp_path / "r.json")
    receipt = Receipt.load(tmp_path / "r.json")
    assert receipt == recorder.receipt()
    assert replay(receipt, model) is None
    changed = edited(receipt, tmp_path, lambda r: r["sampling"].update(logit_bias=[[404, 90]]))
    found = replay(changed, model)
    assert found is not None
    assert found.stage == "sampling"


def test_a_receipt_of_format_1_replays(model: Model, tmp_path: Path) -> None:
    """Drawn by version 1 of sampling, when there was no other."""
    receipt = Receipt.load(FORMAT_1)
    assert (receipt.sampling_version, receipt.format) == (1, "isobit receipt 2")
    assert replay(receipt, model) is None
    assert edited(receipt, tmp_path, lambda _: None) == receipt
    found = replay(edited(receipt, tmp_path, lambda r: r["sampling"].update(seed=12)), model)
    assert found is not None
    assert found.stage == "sampling"
    today = edited(receipt, tmp_path, lambda r: r["sampling"].update(TODAY), sampling_version=2)
    found = replay(today, model)
    assert found is not None
    assert found.stage == "sampling"


def test_watching_changes_nothing(model: Model, recorder: Recorder) -> None:
    alone = model.generate(PROMPT, max_tokens=9, temperature=0.9, seed=11)
    assert alone.token_ids == [t.token for t in recorder.receipt().tokens]


def test_routes(model: Model, recorder: Recorder, tmp_path: Path) -> None:
    recorder.save_routes(tmp_path / "routes")
    saved = load_file(tmp_path / "routes")
    ids = PROMPT + [t.token for t in recorder.receipt().tokens]
    assert saved["tokens"].tolist() == ids[:-1]
    assert saved["experts"].shape == (len(ids) - 1, 8, 4)
    layers: list[Any] = []
    with model.new_sequence() as s:
        model.forward(
            s, ids[:-1], [0], lambda _s, _l, v: layers.append(v), frozenset({"moe_router_indices"})
        )
    assert (saved["experts"] == np.stack(layers, axis=1)).all()


def edited(
    receipt: Receipt, tmp_path: Path, edit: Callable[[dict[str, Any]], None], **fields: object
) -> Receipt:
    receipt.save(tmp_path / "r.json")
    data = json.loads((tmp_path / "r.json").read_text()) | fields
    edit(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    return Receipt.load(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("edit", "index", "stage", "layer"),
    [
        (lambda r: r["tokens"][4].update(logits="0" * 64), 4, "lm_head", None),
        (lambda r: r["tokens"][3]["experts"].__setitem__(6, "0" * 12), 3, "moe_router_indices", 6),
        (lambda r: r["tokens"][0]["experts"].pop(), 0, "moe_router_indices", 7),
        (lambda r: r["tokens"][8].update(token=1), 8, "sampling", None),
        (lambda r: r["sampling"].update(seed=12), None, "sampling", None),
        (lambda r: r["prompt"].append(7), 0, "moe_router_indices", 0),
    ],
)
def test_an_edited_receipt_differs(
    edit: Callable[[dict[str, Any]], None],
    index: int | None,
    stage: str,
    layer: int | None,
    model: Model,
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    found = replay(edited(recorder.receipt(), tmp_path, edit), model)
    assert found is not None
    expected = Difference(found.index if index is None else index, stage, layer)
    assert found == expected


def test_a_faulty_backend_differs(model: Model, recorder: Recorder) -> None:
    rng = np.random.default_rng(0)
    with with_backend(model, lambda w, e: ChangedStage(w, e, "lm_head", None, one_ulp(rng))) as m:
        found = replay(recorder.receipt(), m)
    assert found is not None
    assert found.stage == "lm_head"


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda r: r.update(model_sha256="0" * 64), FileRefused),
        (lambda r: r.update(numerics=2), FileRefused),
        (lambda r: r.update(activation_bits=8), FileRefused),
        (lambda r: r.update(sampling_version=3), FileRefused),
        (lambda r: r.update(sampling_version="2"), FileRefused),
        (lambda r: r.pop("sampling_version"), FileRefused),
        (lambda r: r.update(format="isobit receipt 1"), FileRefused),
        (lambda r: r["sampling"].update(logit_bias=[[1]]), FileRefused),
        (lambda r: r["sampling"].update(logit_bias=[[1 << 40, 1.0]]), FileRefused),
        (lambda r: r["sampling"].update(logit_bias={"1": 2}), FileRefused),
        (lambda r: r.update(tokens=[]), NothingCompared),
        (lambda r: r.update(activation_bits=24), FileRefused),
        (lambda r: r.update(prompt=[]), FileRefused),
        (lambda r: r.update(prompt=[1 << 40]), FileRefused),
        (lambda r: r["tokens"][1].update(token=-1), FileRefused),
        (lambda r: r.update(magic=1), FileRefused),
        (lambda r: r.update(prompt="x"), FileRefused),
        (lambda r: r.update(format="receipt of goods"), FileRefused),
        (lambda r: r.pop("tokens"), FileRefused),
        (lambda r: r["tokens"][0].pop("logits"), FileRefused),
        (lambda r: r["sampling"].update(temperature=-1), FileRefused),
        (lambda r: r["sampling"].update(seed=None), FileRefused),
        (lambda r: r["sampling"].update(top_k=1.5), FileRefused),
        (lambda r: r["sampling"].update(magic=1), FileRefused),
    ],
)
def test_what_is_no_receipt_of_this_model_is_refused(
    edit: Callable[[dict[str, Any]], None],
    error: type[IsobitError],
    model: Model,
    recorder: Recorder,
    tmp_path: Path,
) -> None:
    with pytest.raises(error) as caught:
        replay(edited(recorder.receipt(), tmp_path, edit), model)
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", None),
        ("top_p", 7),
        ("temperature", "hot"),
        ("top_k", 1.5),
        ("grammar", {}),
        ("logit_bias", [[1]]),
        ("magic", 1),
    ],
)
def test_what_is_wrong_with_a_receipt_is_named(
    name: str, value: object, recorder: Recorder, tmp_path: Path
) -> None:
    with pytest.raises(
        FileRefused, match=rf"sampling\.{name} is .*, got {re.escape(shown(value))}$"
    ):
        edited(recorder.receipt(), tmp_path, lambda r: r["sampling"].update({name: value}))


def test_a_receipt_can_be_read_while_the_generation_goes_on(
    model: Model, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a server does, whose engine is ahead of what was taken."""
    whole, (_, digest, routes) = recorder.receipt(), recorder._tokens[-1]
    ahead = Recorder()
    model.generate(PROMPT, max_tokens=9, temperature=0.9, seed=11, watch=ahead)
    digests = model.rows.digests

    def and_another_token(rows: Any) -> Any:
        for part in routes:
            ahead.routed(part)
        ahead.chose(digest, 5)
        return digests(rows)

    monkeypatch.setattr(model.rows, "digests", and_another_token)
    assert ahead.receipt().tokens == whole.tokens
    assert ahead.receipt(4).tokens == whole.tokens[:4]
    assert len(ahead.receipt().tokens) == len(whole.tokens) + 2


def test_a_recorder_watches_one_generation(model: Model, recorder: Recorder) -> None:
    with pytest.raises(UsageError, match="one generation"):
        model.generate(PROMPT, max_tokens=1, watch=recorder)
    with pytest.raises(UsageError, match="nothing was generated"):
        Recorder().receipt()


def test_receipts_are_found_in_whatever_carries_them(recorder: Recorder) -> None:
    receipt = recorder.receipt().to_json()
    one, answer = json.dumps(receipt), json.dumps({"choices": [{"isobit_receipt": receipt}] * 2})
    for text, n in (
        (one, 1),
        (json.dumps(receipt, indent=1), 1),
        (f"\ufeff{one}", 1),
        (answer, 2),
        (f"[{answer}, {one}]", 3),
        (f"{answer}\n\n{answer}\n", 4),
        (f"{one}\r\n{one}", 2),
        (f": ping\nevent: x\ndata: {{}}\n\nid: 1\ndata:{answer}\n\ndata: [DONE]\n\n", 2),
        (json.dumps({"isobit_receipt": True, "response": {"isobit_receipt": receipt}}), 1),
    ):
        found = receipts_in(text.encode(), "x")
        assert [r.to_json() for _, r in found] == [receipt] * n


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x", "x: expected a receipt or an answer in JSON, lines of JSON, or a stream's events"),
        ("", "got none in 0 JSON values"),
        ("HTTP/1.1 200 OK\n\n{}", "x: expected a receipt or an answer in JSON"),
        ('{\n "format": "isobit receipt 3",\n "mo', "line 3 column 2"),
        ("{}\n{", "x, line 2: expected JSON"),
        ("data: {}\n\nevent: y\ndata: {", "x, line 4: expected JSON"),
        ("{}\n{}", "got none in 2 JSON values"),
        (": ping\n\n", "got none in 0 JSON values"),
        ('{"isobit_receipt": {}}', "x: expected 'isobit receipt 3', got something else"),
        ('{"format": "isobit receipt 9"}', "x: expected 'isobit receipt 3', got something else"),
        ('{"custom_id": "a", "response": {"isobit_receipt": {}}}', "x (a): expected 'isobit"),
        ("[" * 900 + "]" * 900, "got none in 1 JSON value"),
        # Each "format" written out as text would be 0.9 GB of it.
        ('{"format":' * 900 + '"' + "x" * (1 << 20) + '"' + "}" * 900, "got none in 1 JSON value"),
        ("[" * 99999, "x: expected a receipt or an answer in JSON"),
        ("\udcff", "x: expected a receipt or an answer in JSON"),
    ],
)
def test_what_carries_no_receipt_is_refused_in_words(text: str, said: str) -> None:
    with pytest.raises(FileRefused) as caught:
        receipts_in(text.encode("utf-8", "surrogateescape"), "x")
    assert said in str(caught.value)
