"""OpenAI's ``/v1/responses``: its request as a chat. response_items writes the answer.

Nothing is stored: each request carries its whole conversation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.errors import UsageError
from isobit.server.answer.answers import Answers
from isobit.server.body import read
from isobit.server.openai.response_items import ResponseWriter
from isobit.server.openai.response_tools import (
    KINDS,
    Offer,
    arguments_of,
    checked_list,
    joined,
    offers,
)
from isobit.server.request.chat import counted, prepared
from isobit.server.request.fields import ChatRequest
from isobit.server.request.prompts import SAMPLING, RequestBody, WholeNumber, of_prompt
from isobit.server.service import Service
from isobit.text.conversation import checked_arguments, checked_name

_CALLS = ("function_call", "custom_tool_call")
_LOGPROBS = "message.output_text.logprobs"


class ResponseRequest(RequestBody):
    """What may be asked; unknown fields are ignored."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: WholeNumber | None = Field(None, ge=0)
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[str] | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    prompt: Any = None
    background: bool | None = None
    seed: WholeNumber | None = None
    top_k: WholeNumber | None = None
    min_p: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    isobit_receipt: bool = False

    @field_validator("previous_response_id", "conversation", "prompt", "background")
    @classmethod
    def _stores_nothing(cls, value: Any) -> Any:
        if value:
            raise ValueError("expected none: this server stores nothing")
        return value

    @property
    def words(self) -> Mapping[str, str]:
        """Those of the chat that it becomes, whose messages and tools are counted otherwise."""
        chat = {
            "messages": "input",
            "chat template": "input",
            "tools": "tools",
            "response_format": "text.format",
            "reasoning_effort": "reasoning.effort",
            "max_tokens": "max_output_tokens",
        }
        return chat | of_prompt("input") | SAMPLING

    @property
    def own_tools(self) -> list[dict[str, Any]]:
        """The tools that a client runs, wherever they stand. Raises UsageError."""
        items = self.input if isinstance(self.input, list) else []
        every = [*(self.tools or ())]
        for i, item in enumerate(items):
            if item.get("type") == "additional_tools":
                every += checked_list(item.get("tools"), f"input[{i}].tools")
        return [tool for tool in every if tool.get("type") in KINDS]

    @property
    def offers(self) -> list[Offer]:
        """The same one by one."""
        return offers(self.own_tools)

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises UsageError for what there is not, ValidationError."""
        body: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "top_k", "min_p", "seed", "isobit_receipt")
        }
        measured = _LOGPROBS in (self.include or ()) or bool(self.top_logprobs)
        body |= {
            "messages": self._messages(),
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": measured,
            "top_logprobs": self.top_logprobs if measured else None,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "reasoning_effort": (self.reasoning or {}).get("effort"),
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        if found := self.offers:
            tools = [{"type": "function", "function": offer.function} for offer in found]
            body |= {"tools": tools, "tool_choice": self._choice()}
        elif self.tool_choice not in (None, "auto", "none"):
            raise UsageError("tool_choice: expected functions among the tools, got none")
        return ChatRequest.model_validate(body)

    def _format(self) -> dict[str, Any] | None:
        asked = (self.text or {}).get("format")
        if not isinstance(asked, dict | None):
            raise UsageError(f"text.format: expected an object, got {asked!r:.60}")
        if not asked or asked.get("type") in (None, "text"):
            return None
        if asked["type"] == "json_schema":
            schema = {name: value for name, value in asked.items() if name != "type"}
            return {"type": "json_schema", "json_schema": schema}
        return asked

    def _choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") in ("function", "custom"):
            return {"type": "function", "function": {"name": _known_by(choice)}}
        if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
            each = (tool for tool in choice["tools"] if isinstance(tool, dict))
            named = [{"name": _known_by(tool)} for tool in each if tool.get("type") in KINDS]
            return choice | {"tools": named}
        raise UsageError(
            f"tool_choice: expected one of the functions, got {choice.get('type')!r:.60}"
        )

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        turn: dict[str, Any] | None = None  # the assistant's, of which several items are parts
        for i, item in enumerate(self.input):
            place, kind = f"input[{i}]", item.get("type", "message")
            if kind in ("reasoning", *_CALLS) or _is_answer(item, kind):
                if turn is None or (kind == "reasoning" and turn.keys() - {"role"}):
                    turn = {"role": "assistant"}
                    messages.append(turn)
                _take(turn, item, kind, place)
            elif kind == "message":
                turn = None
                role = item.get("role")
                if role not in ("user", "system", "developer"):
                    raise UsageError(f"{place}.role: expected a role, got {role!r:.60}")
                content = _text(item.get("content"), f"{place}.content")
                messages.append({"role": role, "content": content})
            elif kind in ("function_call_output", "custom_tool_call_output"):
                turn = None
                content = _text(item.get("output"), f"{place}.output")
                call = item.get("call_id")
                messages.append({"role": "tool", "tool_call_id": call, "content": content})
            elif kind != "additional_tools":
                raise UsageError(
                    f"{place}.type: expected message, reasoning, function_call or "
                    f"function_call_output, got {kind!r:.60}"
                )
        for message in messages:
            if message["role"] == "assistant":
                message.setdefault("content", None if message.get("tool_calls") else "")
        return messages


def _is_answer(item: dict[str, Any], kind: str) -> bool:
    return kind == "message" and item.get("role") == "assistant"


def _take(turn: dict[str, Any], item: dict[str, Any], kind: str, place: str) -> None:
    """Add an item to the assistant's turn that it is a part of."""
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        turn["reasoning_content"] = _text(parts, f"{place}.content")
    elif kind == "message":
        text = _text(item.get("content"), f"{place}.content")
        turn["content"] = turn.get("content", "") + text
    else:
        custom = kind == "custom_tool_call"
        arguments = arguments_of(item.get("input")) if custom else item.get("arguments")
        checked_arguments(arguments, f"{place}.arguments")
        checked_name(item.get("name"), f"{place}.name")
        function = {"name": _known_by(item), "arguments": arguments}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        turn.setdefault("tool_calls", []).append(call)


def _text(content: object, place: str) -> str:
    """Text, or the parts of one. Raises UsageError for a picture, a file and what is neither."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UsageError(f"{place}: expected a text or a list of its parts")
    texts = []
    for i, part in enumerate(content):
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise UsageError(f"{place}[{i}]: expected a part with text, got {kind!r:.60}")
        texts.append(text)
    return "".join(texts)


def _known_by(item: dict[str, Any]) -> Any:
    """What the model knows a tool by that a call or a choice names."""
    return joined(item.get("namespace"), item.get("name"))


class Responses:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where they are."""
        return [
            Route("/v1/responses", self.responses, methods=["POST"]),
            Route("/v1/responses/input_tokens", self.count, methods=["POST"]),
        ]

    async def responses(self, request: Request) -> Response:
        """``POST /v1/responses``: the answer to a conversation, as items."""
        asked = await read(request, ResponseRequest)
        service, chat = self._service, asked.chat()
        ready = await prepared(service.model, chat)
        measured = chat.measured
        prompts, most = [ready.prompt], chat.most
        answers = Answers(service, request, chat, prompts, most=most, logprobs=measured, chat=ready)
        echo, tools = self._echo(asked, chat), asked.offers
        writer = ResponseWriter(service, echo, answers, tools, measured=measured is not None)
        if asked.stream:
            return answers.stream(writer)
        return JSONResponse(writer.response(await answers.written(writer)))

    async def count(self, request: Request) -> Response:
        """``POST /v1/responses/input_tokens``: the length of the prompt."""
        asked = await read(request, ResponseRequest)
        ids = await counted(self._service.model, asked.chat())
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(ids)})

    def _echo(self, asked: ResponseRequest, chat: ChatRequest) -> dict[str, Any]:
        """What an answer repeats of the request."""
        sampling = chat.sampling
        return {
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self._service.name,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None} | (asked.reasoning or {}),
            "store": False,
            "background": False,
            "temperature": sampling.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": [
                {"strict": None, "parameters": None} | tool if tool["type"] == "function" else tool
                for tool in asked.own_tools
            ],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "user": asked.user,
            "system_fingerprint": self._service.fingerprint,
        }
