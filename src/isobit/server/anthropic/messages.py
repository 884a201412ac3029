"""Anthropic's ``/v1/messages``: its request as a chat. message_blocks writes the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from isobit.errors import UsageError
from isobit.server.answer.answers import Answers
from isobit.server.anthropic.message_blocks import MessageWriter
from isobit.server.body import read
from isobit.server.request.chat import counted, prepared
from isobit.server.request.fields import MOST_STOPS, ChatRequest, Stop
from isobit.server.request.prompts import RequestBody, WholeNumber, of_prompt
from isobit.server.service import Service
from isobit.text.conversation import checked_arguments, checked_name

Block = dict[str, Any]


class Turn(RequestBody):
    """A message."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class CountRequest(RequestBody):
    """What may be counted; unknown fields are ignored."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    model: str | None = None
    system: str | list[Block] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None

    @property
    def words(self) -> Mapping[str, str]:
        """Those of the chat that it becomes, whose messages and tools are counted otherwise."""
        chat = {
            "messages": "messages",
            "chat template": "messages",
            "tools": "tools",
            "response_format": "output_format" if self.output_format else "output_config.format",
            "stop": "stop_sequences",
        }
        return chat | of_prompt("messages")

    def chat(self) -> ChatRequest:
        """The same as a chat. Raises UsageError for what there is not, ValidationError."""
        return ChatRequest.model_validate(self._chat())

    def _chat(self) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system, "system")})
        for i, turn in enumerate(self.messages):
            messages += _messages(turn, f"messages.{i}")
        if messages[-1]["role"] == "assistant":
            raise UsageError("messages: expected the user's at the end, got the assistant's")
        thinking = (self.thinking or {}).get("type", "disabled")
        if not isinstance(thinking, str):
            raise UsageError(f"thinking.type: expected a text, got {thinking!r:.60}")
        body: dict[str, Any] = {
            "messages": messages,
            "enable_thinking": thinking != "disabled",
            "response_format": self._format(),
        }
        functions = [_function(t) for i, t in enumerate(self.tools or ()) if _is_own(t, i)]
        choice = self.tool_choice or {}
        if not functions and choice.get("type", "auto") not in ("auto", "none"):
            raise UsageError("tool_choice: expected tools with an input_schema, got none")
        if functions:
            body |= {
                "tools": functions,
                "tool_choice": _choice(choice),
                "parallel_tool_calls": not choice.get("disable_parallel_tool_use"),
            }
        return body

    def _format(self) -> dict[str, Any] | None:
        asked = self.output_format or (self.output_config or {}).get("format")
        if not asked:
            return None
        if not isinstance(asked, dict):
            raise UsageError(f"output_config.format: expected an object, got {asked!r:.60}")
        schema = {"name": "answer", "schema": asked.get("schema"), "strict": True}
        return {"type": asked.get("type"), "json_schema": schema}


class MessageRequest(CountRequest):
    """What may be asked; unknown fields are ignored."""

    max_tokens: WholeNumber = Field(ge=0)
    stop_sequences: Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: WholeNumber | None = None
    stream: bool | None = None
    seed: WholeNumber | None = None
    isobit_receipt: bool = False

    def _chat(self) -> dict[str, Any]:
        names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "isobit_receipt")
        own = {name: getattr(self, name) for name in names}
        return super()._chat() | own | {"stop": self.stop_sequences or None}


def _messages(turn: Turn, place: str) -> list[dict[str, Any]]:
    """A turn's messages: the results of tools are the first, one each."""
    if isinstance(turn.content, str):
        return [{"role": turn.role, "content": turn.content}]
    results: list[dict[str, Any]] = []
    message: dict[str, Any] = {"role": turn.role}
    for i, block in enumerate(turn.content):
        at, kind = f"{place}.content.{i}", block.get("type")
        if kind == "tool_result":
            content = _text(block.get("content") or "", f"{at}.content")
            call = block.get("tool_use_id")
            results.append({"role": "tool", "tool_call_id": call, "content": content})
        elif kind == "tool_use" and turn.role == "assistant":
            arguments = checked_arguments(block.get("input"), f"{at}.input")
            name = checked_name(block.get("name"), f"{at}.name")
            said = json.dumps(arguments, ensure_ascii=False)
            function = {"name": name, "arguments": said}
            call = {"id": block.get("id"), "type": "function", "function": function}
            message.setdefault("tool_calls", []).append(call)
        elif kind == "thinking" and turn.role == "assistant":
            message["reasoning_content"] = str(block.get("thinking") or "")
        elif kind != "redacted_thinking":
            message["content"] = message.get("content", "") + _text([block], at)
    if message.keys() - {"role"}:
        message.setdefault("content", None)
        return [*results, message]
    return results or [message | {"content": ""}]


def _text(content: object, place: str) -> str:
    """Text, or the blocks of one. Raises UsageError for pictures, files and what is neither."""
    if isinstance(content, str):
        return content
    texts = []
    for block in content if isinstance(content, list) else [content]:
        text = block.get("text") if isinstance(block, dict) else None
        if isinstance(block, dict) and block.get("type") == "document":
            source = block.get("source")
            text = source.get("data") if isinstance(source, dict) else None
            text = text if isinstance(source, dict) and source.get("type") == "text" else None
        if not isinstance(text, str):
            kind = block.get("type") if isinstance(block, dict) else type(block).__name__
            raise UsageError(f"{place}: expected text, got {kind!r:.60}")
        texts.append(text)
    return "".join(texts)


def _is_own(tool: dict[str, Any], i: int) -> bool:
    """Whether a client runs it; those that Anthropic would run have a type."""
    schema = tool.get("input_schema")
    if schema is None and tool.get("type", "custom") != "custom":
        return False
    if not isinstance(schema, dict):
        raise UsageError(f"tools.{i}.input_schema: expected a schema, got {schema!r:.60}")
    checked_name(tool.get("name"), f"tools.{i}.name")
    return True


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    function = {"name": tool.get("name"), "parameters": tool["input_schema"]}
    if tool.get("description"):
        function["description"] = tool["description"]
    if tool.get("strict") is not None:
        function["strict"] = tool["strict"]
    return {"type": "function", "function": function}


def _choice(choice: dict[str, Any]) -> Any:
    kind = choice.get("type", "auto")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return "required" if kind == "any" else kind


class Messages:
    """The handlers."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def routes(self) -> list[Route]:
        """Where they are."""
        return [
            Route("/v1/messages", self.messages, methods=["POST"]),
            Route("/v1/messages/count_tokens", self.count, methods=["POST"]),
        ]

    async def messages(self, request: Request) -> Response:
        """``POST /v1/messages``: the answer to a conversation, as blocks."""
        asked = await read(request, MessageRequest)
        service, chat = self._service, asked.chat()
        ready = await prepared(service.model, chat)
        answers = Answers(service, request, chat, [ready.prompt], most=chat.most, chat=ready)
        writer = MessageWriter(service, answers, len(ready.prompt))
        if asked.stream:
            return answers.stream(writer)
        return JSONResponse(writer.message(await answers.written(writer)))

    async def count(self, request: Request) -> Response:
        """``POST /v1/messages/count_tokens``: the length of the prompt."""
        asked = await read(request, CountRequest)
        ids = await counted(self._service.model, asked.chat())
        return JSONResponse({"input_tokens": len(ids)})
