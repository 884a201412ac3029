"""Between the engine's thread and the event loop: what is read of a generation that goes on, and
requests that come in as the server ends. Who comes first is decided here, not by the machine."""

import asyncio
import threading
from typing import Any

import httpx
import openai
import pytest

from isobit.runtime.detokenizer import StopText
from isobit.runtime.model import Model
from isobit.runtime.request import Request
from isobit.runtime.sampler import Sampling
from isobit.runtime.tokens import Token
from isobit.server.answer.choices import Choice
from isobit.server.app import build
from isobit.server.batch.batch import post
from isobit.server.openai import completions as completing
from isobit.server.openai import embeddings
from isobit.server.service import Service
from tests.server.test_server import PROMPT, url


def test_a_first_token_that_comes_as_one_looks_comes_after_the_prompts(alone: Model) -> None:
    ids, engine = alone.tokenize(PROMPT), alone.generations

    async def run() -> None:
        settings = {"stops": StopText([]), "logprobs": 1, "of_prompt": True, "receipt": False}
        choice = Choice(engine, 0, ids, 3, Sampling(), **settings)
        take = choice.generation.take

        def late() -> Token | None:
            while not (choice.generation.ready or choice.generation.ended):
                engine.step()
            return take()

        choice.generation.take = late  # type: ignore[method-assign]
        piece = choice.piece()
        assert piece is not None
        assert [t.id for t in piece.prompt] == ids
        assert piece.prompt[0].logprob is None
        assert all(t.logprob is not None for t in [*piece.prompt[1:], *piece.tokens])
        choice.generation.cancel()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("module", "path", "body"),
    [
        (completing, "/v1/completions", {"prompt": PROMPT, "max_tokens": 2}),
        (embeddings, "/v1/embeddings", {"input": PROMPT}),
    ],
)
def test_a_request_that_is_read_as_the_server_ends_is_told_so(
    module: Any, path: str, body: Any, alone: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service(alone) as service:
        encoded = module.encoded

        async def ends_meanwhile(*given: Any) -> list[list[int]]:
            await service.end()
            return await encoded(*given)

        monkeypatch.setattr(module, "encoded", ends_meanwhile)
        asked = asyncio.wait_for(post(build(service), path, body), 30)
        status, answer = asyncio.run(asked)
    assert status == 503
    assert answer["error"]["message"] == "the server is shutting down"
    assert not alone.generations.scheduler.waiting


def test_metrics_are_of_one_moment(
    client: openai.OpenAI, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish, found = service.engine.scheduler.finish, list[dict[str, str]]()

    def metrics() -> None:
        text = httpx.get(url(client, "/metrics"), timeout=60).text
        found.append(dict(r.rsplit(" ", 1) for r in text.splitlines() if r.startswith("isobit_")))

    asking = threading.Thread(target=metrics)

    def asked_meanwhile(request: Request) -> None:
        if asking.ident is None:  # as the first of the two ends
            asking.start()
            asking.join(0.3)
        finish(request)

    monkeypatch.setattr(service.engine.scheduler, "finish", asked_meanwhile)
    # Sampled, one of them may end earlier.
    client.completions.create(model="m", prompt=PROMPT, max_tokens=2, n=2, temperature=0)
    asking.join()
    pages = {name: float(v) for name, v in found[0].items() if "cache_pages" in name}
    assert sum(pages.values()) == service.engine.scheduler.blocks.total
    assert float(found[0]["isobit_requests_running"]) == pages["isobit_cache_pages_held"] == 0
