"""``/generate`` in SGLang's shape: tokens in and out, log-probabilities, routed experts."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.errors import UsageError
from isobit.runtime.tokens import Token
from isobit.server.answer.answers import Answers, event
from isobit.server.answer.choices import Choice, Piece
from isobit.server.body import read
from isobit.server.errors import error_body
from isobit.server.parsing.events import Finish, Usage, gathered
from isobit.server.request.chat import held
from isobit.server.request.fields import MOST_CHOICES, Common, SamplingFields
from isobit.server.request.prompts import (
    SAMPLING,
    Prompt,
    RequestBody,
    WholeNumber,
    encoded,
    listed,
    of_prompt,
)
from isobit.server.service import Service


class GenerateSampling(SamplingFields):
    """How tokens are chosen, under SGLang's names."""

    max_new_tokens: WholeNumber | None = Field(128, ge=0)
    sampling_seed: WholeNumber | None = None
    seed: WholeNumber | None = None
    """The other interfaces' name of it."""
    ebnf: str | None = None
    structural_tag: str | None = None

    def common(self, *, receipt: bool) -> Common:
        """As the other interfaces have it. Raises UsageError for what is not implemented."""
        if self.structural_tag is not None:
            raise UsageError("structural_tag: expected json_schema, regex or ebnf in its place")
        values = self.model_dump(exclude={"max_new_tokens", "sampling_seed", "seed", "ebnf"})
        seed = self.seed if self.sampling_seed is None else self.sampling_seed
        own = {"seed": seed, "grammar": self.ebnf, "isobit_receipt": receipt}
        return Common.model_validate(values | own)


class GenerateRequest(RequestBody):
    """What may be asked; unknown fields are ignored."""

    text: str | list[str] | None = None
    input_ids: list[int] | list[list[int]] | None = None
    sampling_params: GenerateSampling = Field(default_factory=GenerateSampling.model_construct)
    return_logprob: bool = False
    logprob_start_len: Annotated[int, Field(ge=-1)] = -1
    """From here on the prompt's tokens are measured too; -1: none of them."""
    top_logprobs_num: Annotated[int, Field(ge=0, le=20)] = 0
    return_text_in_logprobs: bool = False
    return_routed_experts: bool = False
    stream: bool = False
    rid: str | None = None
    isobit_receipt: bool = False

    @property
    def words(self) -> Mapping[str, str]:
        """How tokens are chosen stands in an object of its own, under names of its own."""
        params = self.sampling_params
        inside = {name: name for name in type(params).model_fields} | SAMPLING
        inside |= {"grammar": "ebnf", "max_tokens": "max_new_tokens"}
        if params.sampling_seed is not None:
            inside["seed"] = "sampling_seed"
        words = {name: f"sampling_params.{own}" for name, own in inside.items()}
        return words | of_prompt(
            "input_ids" if self.text is None and self.input_ids is not None else "text"
        )


class Generate:
    """The handler."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where it is."""
        return [Route("/generate", self.generate, methods=["POST"])]

    async def generate(self, request: Request) -> Response:
        """``POST /generate``: what follows a text or token ids, or several of them."""
        asked = await read(request, GenerateRequest)
        if (asked.text is None) == (asked.input_ids is None):
            raise UsageError("text: expected it or input_ids, one of them")
        model, params = self._service.model, asked.sampling_params
        if asked.return_routed_experts and not model.config.is_moe:
            raise UsageError("return_routed_experts: expected a mixture of experts, got none")
        common = params.common(receipt=asked.isobit_receipt)
        prompt: Prompt = asked.input_ids or asked.text or []
        prompts = listed(prompt, MOST_CHOICES)
        answers = Answers(
            self._service,
            request,
            common,
            await encoded(model, prompts),
            most=params.max_new_tokens,
            logprobs=asked.top_logprobs_num if asked.return_logprob else None,
            echo=asked.return_logprob and asked.logprob_start_len >= 0,
            routes=asked.return_routed_experts,
            chat=await held(model, common),
        )
        one = prompts[0] is prompt and len(answers.choices) == 1
        outputs = [_Output(self._service, asked, answers, choice) for choice in answers.choices]
        if asked.stream:
            return answers.stream(_Growing(outputs, one=one))
        found, _ = await answers.whole()
        for output, pieces in zip(outputs, found, strict=True):
            for piece in pieces:
                output.add(piece)
        bodies = [output.body() for output in outputs]
        return JSONResponse(bodies[0] if one else bodies)


class _Output:
    """What one choice has come to."""

    def __init__(
        self, service: Service, asked: GenerateRequest, answers: Answers, choice: Choice
    ) -> None:
        self._service = service
        self._asked = asked
        self._answers = answers
        self._choice = choice
        self._began = time.monotonic()
        self._id = asked.rid or answers.journal.name(choice.index)
        self._text = ""
        self._tokens: list[Token] = []
        self._finish: dict[str, Any] | None = None

    def add(self, piece: Piece) -> None:
        """What is new of it."""
        self._tokens += piece.tokens
        if piece.end is not None:
            self._tokens.append(piece.end)
        self._text += gathered(piece.events).text
        if piece.finish is not None:
            self._finish = self._reason(piece.finish, piece.end)

    def _reason(self, finish: Finish, end: Token | None) -> dict[str, Any]:
        if finish.reason == "length":
            return {"type": "length", "length": self._choice.n_tokens}
        matched = finish.stop if end is None else end.id
        return {"type": "stop", "matched": matched}

    def body(self) -> dict[str, Any]:
        """All of it."""
        request = self._choice.generation.request
        meta: dict[str, Any] = {
            "id": self._id,
            "finish_reason": self._finish,
            "prompt_tokens": len(request.prompt),
            "completion_tokens": self._choice.n_tokens,
            "cached_tokens": self._choice.cached,
            "weight_version": self._service.fingerprint,
            "e2e_latency": time.monotonic() - self._began,
        }
        if self._asked.return_logprob:
            start, generation = self._asked.logprob_start_len, self._choice.generation
            prompt = [Token(request.prompt[0]), *generation.prompt][start:] if start >= 0 else []
            meta |= self._measured("input", prompt) | self._measured("output", self._tokens)
        if self._asked.return_routed_experts and self._finish is not None:
            experts = self._choice.routes.astype("<i4")
            meta["routed_experts"] = base64.b64encode(experts.tobytes()).decode()
        ids = [token.id for token in self._tokens]
        receipt = self._answers.receipt(self._choice.index) if self._finish is not None else {}
        return {"text": self._text, "output_ids": ids, "meta_info": meta, **receipt}

    def _measured(self, what: str, tokens: Sequence[Token]) -> dict[str, Any]:
        found: dict[str, Any] = {
            f"{what}_token_logprobs": [self._entry(token.id, token.logprob) for token in tokens]
        }
        if self._asked.top_logprobs_num:
            found[f"{what}_top_logprobs"] = [
                [self._entry(*pair) for pair in token.top] or None for token in tokens
            ]
        return found

    def _entry(self, token: int, logprob: float | None) -> list[Any]:
        text = None
        if self._asked.return_text_in_logprobs:
            text = self._service.model.tokenizer.token_bytes(token).decode(errors="replace")
        return [logprob, token, text]


class _Growing:
    """The stream: each event has all that there is of a choice."""

    def __init__(self, outputs: Sequence[_Output], *, one: bool) -> None:
        self._outputs = outputs
        self._one = one

    def begin(self) -> Iterator[str]:
        """Nothing."""
        yield from ()

    def piece(self, piece: Piece) -> Iterator[str]:
        """A choice has grown."""
        output = self._outputs[piece.index]
        output.add(piece)
        index = {} if self._one else {"index": piece.index}
        yield event(json.dumps(output.body() | index, ensure_ascii=False))

    def ping(self) -> str:
        """A comment."""
        return ": still here\n\n"

    def end(self, _used: Usage) -> Iterator[str]:
        """The word that ends it."""
        yield event("[DONE]")

    def error(self, message: str) -> Iterator[str]:
        """An error in place of a choice."""
        yield event(json.dumps(error_body(message, "server_error")))
