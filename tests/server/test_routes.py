"""The routes beside chats and completions: embeddings, /generate, what there is to know."""

import base64
import json
import math
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from isobit.runtime.model import Model
from isobit.server.openai.embeddings import unit
from isobit.server.service import Service
from isobit.verify.receipt import Recorder
from tests.server.conftest import Gate
from tests.server.test_server import PROMPT, url


def post(client: openai.OpenAI, path: str, body: object) -> httpx.Response:
    return httpx.post(url(client, path), json=body, timeout=120)


def state_after(model: Model, ids: list[int]) -> np.ndarray:
    seen = []
    with model.new_sequence() as sequence:
        model.forward(
            sequence, ids, [], lambda *s: seen.append(np.array(s[2])), frozenset({"final_norm"})
        )
    return seen[0][-1]


def test_an_embedding_is_the_state_after_the_last_token(
    client: openai.OpenAI, alone: Model
) -> None:
    texts = [PROMPT, "x", PROMPT * 30]  # the last takes several pages, and hits the first's
    found = client.embeddings.create(model="sample", input=texts)  # asks for base64
    floats = client.embeddings.create(model="sample", input=texts, encoding_format="float")
    for text, one, other in zip(texts, found.data, floats.data, strict=True):
        ids = alone.tokenize(text)
        wanted = unit(state_after(alone, ids))
        assert np.array_equal(np.array(one.embedding, np.float32), wanted)
        assert np.array_equal(np.array(other.embedding, np.float32), wanted)
        by_ids = client.embeddings.create(model="sample", input=ids).data[0].embedding
        assert by_ids == one.embedding
    assert found.usage.prompt_tokens == sum(len(alone.tokenize(text)) for text in texts)
    short = client.embeddings.create(model="sample", input="x", dimensions=5).data[0].embedding
    assert np.array_equal(
        np.array(short, np.float32), unit(state_after(alone, alone.tokenize("x"))[:5])
    )


def test_a_unit_vector_is_rounded_once() -> None:
    rng = np.random.default_rng(5)
    state = (rng.standard_normal(300) * 10.0 ** rng.integers(-3, 4, 300)).astype(np.float32)
    length = math.sqrt(math.fsum(float(x) ** 2 for x in state))
    assert unit(state).tolist() == [float(np.float32(float(x) / length)) for x in state]
    assert not unit(np.zeros(3, np.float32)).any()


def test_generate_gives_tokens_log_probabilities_and_experts(
    client: openai.OpenAI, alone: Model
) -> None:
    ids = alone.tokenize(PROMPT * 20)
    body = {
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 9, "temperature": 0.7, "sampling_seed": 3},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "return_text_in_logprobs": True,
        "return_routed_experts": True,
        "isobit_receipt": True,
    }
    recorder = Recorder()
    wanted = alone.generate(ids, max_tokens=9, temperature=0.7, seed=3, logprobs=2, watch=recorder)
    scores = alone.score(ids[:1], ids[1:])
    for _ in range(2):  # the second time most of it is in the cache
        found = post(client, "/generate", body).json()
        meta = found["meta_info"]
        assert (found["text"], found["output_ids"]) == (wanted.text, wanted.token_ids)
        assert meta["completion_tokens"] == 9
        assert meta["finish_reason"] == {"type": "length", "length": 9}
        values = [entry[0] for entry in meta["output_token_logprobs"]]
        assert np.array_equal(np.array(values, np.float32), wanted.logprobs.tokens)
        assert [entry[1] for entry in meta["output_token_logprobs"]] == wanted.token_ids
        first, *rest = meta["input_token_logprobs"]
        assert first == [None, ids[0], alone.detokenize(ids[:1])]
        assert np.array_equal(np.array([entry[0] for entry in rest], np.float32), scores)
        tops = [[entry[1] for entry in top] for top in meta["output_top_logprobs"]]
        assert tops == wanted.logprobs.top_ids.tolist()
        experts = np.frombuffer(base64.b64decode(meta["routed_experts"]), "<i4")
        assert np.array_equal(experts, recorder.routes()[1].ravel())
        assert [t["token"] for t in found["isobit_receipt"]["tokens"]] == wanted.token_ids


def test_generate_streams_all_that_there_is_of_each(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 1, "seed": 1, "stop": ["\n\n"]}
    body = {"text": [PROMPT, "import "], "sampling_params": sampling | {"n": 2}}
    whole = post(client, "/generate", body).json()
    assert len(whole) == 4
    gate, lines = Gate(service.model, monkeypatch, 8), []
    with httpx.stream("POST", url(client, "/generate"), json=body | {"stream": True}) as answer:
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            gate.opened.set()  # now that there is something of one
    assert lines.pop() == "data: [DONE]"
    last: dict[int, Any] = {}
    for line in lines:
        data = json.loads(line.removeprefix("data: "))
        before = last.setdefault(data["index"], data)
        assert data["text"].startswith(before["text"])
        last[data["index"]] = data
    assert [last[i]["text"] for i in range(4)] == [each["text"] for each in whole]
    assert [last[i]["output_ids"] for i in range(4)] == [each["output_ids"] for each in whole]
    assert len(lines) > 4


def test_a_token_that_ends_an_answer_is_named_and_measured(
    client: openai.OpenAI, alone: Model
) -> None:
    [first, *_] = alone.generate(PROMPT, max_tokens=1).token_ids
    sampling = {"temperature": 0, "stop_token_ids": [first]}
    found = post(client, "/generate", {"text": PROMPT, "sampling_params": sampling}).json()
    assert (found["text"], found["output_ids"]) == ("", [first])
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": first}
    done = client.completions.create(
        model="sample",
        prompt=PROMPT,
        echo=True,
        logprobs=1,
        max_tokens=1,
        temperature=0,
        extra_body={"stop_token_ids": [first]},
    )
    assert done.choices[0].text == PROMPT
    measured = done.choices[0].logprobs.token_logprobs
    assert len(measured) == len(alone.tokenize(PROMPT)) + 1
    assert measured[-1] == alone.score(alone.tokenize(PROMPT), [first])[0]


def test_what_the_server_says_of_itself(
    client: openai.OpenAI, service: Service, alone: Model
) -> None:
    info = httpx.get(url(client, "/tokenizer_info")).json()
    assert info["vocab_size"] == alone.tokenizer.vocab_size
    assert alone.tokenize(info["eos_token"])[0] in info["stop_token_ids"]
    assert httpx.get(url(client, "/ready")).json()["status"] == "ready"
    version = httpx.get(url(client, "/version")).json()
    assert version["fingerprint"] == service.fingerprint
    client.completions.create(model="sample", prompt=PROMPT, max_tokens=2)
    text = httpx.get(url(client, "/metrics")).text
    assert 'vllm:num_requests_running{model_name="sample"} 0.0' in text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    for name in ("isobit_time_to_first_token_seconds_count", "isobit_answer_seconds_count"):
        assert float(counts[name]) >= 1


def test_the_openapi_document_is_of_the_routes_there_are(client: openai.OpenAI) -> None:
    document = httpx.get(url(client, "/openapi.json")).json()
    assert "/v1/embeddings" in document["paths"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"]
            answer = httpx.request(method, url(client, path.replace("{model}", "none")), json={})
            assert answer.status_code not in (404, 405) or "{model}" in path
            if method == "post":
                assert operation["requestBody"]["content"]["application/json"]["schema"]
    kind = document["components"]["schemas"]["CompletionRequest"]
    assert kind["required"] == ["prompt"]


def test_ready_says_when_the_engine_is_gone(alone: Model) -> None:
    with Service(alone) as service:
        assert service.ready
    assert not service.ready


def test_ready_says_that_a_device_is_lost(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service.model.backend, "lost", "cuda: device 1 of 2 has not answered")
    ready = httpx.get(url(client, "/ready"))
    assert ready.status_code == 503
    assert ready.json()["error"]["message"] == "cuda: device 1 of 2 has not answered"
