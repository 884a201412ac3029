"""How ``/v1/responses`` writes an answer: items, and the events by which they grow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from isobit.server.answer.answers import Answers, event
from isobit.server.answer.choices import Piece
from isobit.server.openai.bodies import chat_logprobs
from isobit.server.openai.response_tools import Offer, input_of
from isobit.server.parsing.events import (
    CallArguments,
    CallBegins,
    CallEnds,
    Event,
    Finish,
    Reasoning,
    Text,
    Usage,
)
from isobit.server.service import Service

Item = dict[str, Any]


class ResponseWriter:
    """One answer. As an encoder it streams; what it has gathered is the answer at once."""

    def __init__(
        self,
        service: Service,
        echo: dict[str, Any],
        answers: Answers,
        tools: Sequence[Offer] = (),
        *,
        measured: bool,
    ) -> None:
        """``echo``: what the answer repeats of the request."""
        self._tools = {str(tool.function["name"]): tool for tool in tools}
        self._tokenizer = service.model.tokenizer
        self._answers = answers
        self._measured = measured
        self._id = f"resp_{answers.journal.name()}"
        self._head = {"object": "response", "created_at": int(answers.journal.created)} | echo
        self._items: list[Item] = []
        self._open = False  # the last of them still grows
        self._text: list[str] = []  # of it
        self._finish: Finish | None = None
        self._sequence = 0

    # The answer

    def response(self, used: Usage | None, error: str | None = None) -> dict[str, Any]:
        """All of it as it is now."""
        status, why = "in_progress", None
        if error is not None:
            status = "failed"
        elif self._finish is not None:
            cut = self._finish.reason == "length"
            status = "incomplete" if cut else "completed"
            why = {"reason": "max_output_tokens"} if cut else None
        return {
            "id": self._id,
            "status": status,
            "error": None if error is None else {"code": "server_error", "message": error},
            "incomplete_details": why,
            "output": self._items,
            "usage": None if used is None else _usage(used),
            **self._head,
            **(self._answers.receipt(0) if self._finish else {}),
        }

    # The stream

    def begin(self) -> Iterator[str]:
        """That it has begun."""
        yield self._event("response.created", response=self.response(None))
        yield self._event("response.in_progress", response=self.response(None))

    def piece(self, piece: Piece) -> Iterator[str]:
        """What is new."""
        for what, tokens in zip(piece.events, piece.of_events, strict=True):
            measured = tokens if isinstance(what, Text) and self._measured else []
            yield from self._read(what, chat_logprobs(self._tokenizer, measured)["content"])

    def ping(self) -> str:
        """A comment."""
        return ": still here\n\n"

    def end(self, used: Usage) -> Iterator[str]:
        """All of it again."""
        response = self.response(used)
        yield self._event(f"response.{response['status']}", response=response)

    def error(self, message: str) -> Iterator[str]:
        """That it has failed."""
        yield self._event("error", code="server_error", message=message, param=None)
        yield self._event("response.failed", response=self.response(None, message))

    # Items

    def _read(self, what: Event, tokens: list[Any]) -> Iterator[str]:
        match what:
            case Text(text):
                yield from self._into("message")
                yield from self._grow("output_text", text, {"logprobs": tokens})
                self._items[-1]["content"][0]["logprobs"] += tokens
            case Reasoning(text):
                yield from self._into("reasoning")
                yield from self._grow("reasoning_text", text, {})
            case CallBegins(_, id_, name):
                tool = self._tools.get(name) or Offer({}, name)
                yield from self._into("call", {"call_id": id_} | tool.item())
            case CallArguments(_, arguments):
                self._text.append(arguments)
                if self._items[-1]["type"] == "function_call":  # else they are read at its end
                    place = self._place(content=False)
                    name = "response.function_call_arguments.delta"
                    yield self._event(name, delta=arguments, **place)
            case CallEnds():
                yield from self._close("completed")
            case Finish():
                self._finish = what
                yield from self._close("incomplete" if what.reason == "length" else "completed")

    def _into(self, kind: str, more: dict[str, Any] | None = None) -> Iterator[str]:
        """Have an item of this kind grow; a call is always another one."""
        if self._open and self._items[-1]["type"] == kind and more is None:
            return
        yield from self._close("completed")
        item: Item = {"type": kind, "status": "in_progress"} | (more or {})
        item["id"] = self._name(_PREFIX[item["type"]])
        if more is None:
            item["content"] = []
            if kind == "message":
                item["role"] = "assistant"
            else:
                item["summary"] = []
        self._items.append(item)
        self._open, self._text = True, []
        yield self._event("response.output_item.added", item=item, output_index=self._index)
        if more is None:
            item["content"].append(_part(kind))
            place = self._place()
            yield self._event("response.content_part.added", part=item["content"][0], **place)

    def _grow(self, part: str, text: str, more: dict[str, Any]) -> Iterator[str]:
        self._text.append(text)
        yield self._event(f"response.{part}.delta", delta=text, **self._place(), **more)

    def _close(self, status: str) -> Iterator[str]:
        if not self._open:
            return
        self._open = False
        item, text = self._items[-1], "".join(self._text)
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = text
            place = self._place(content=False)
            done = "response.function_call_arguments.done"
            yield self._event(done, arguments=text, name=item["name"], **place)
        elif item["type"] == "custom_tool_call":
            item["input"] = input_of(text)
            place = self._place(content=False)
            kind = "response.custom_tool_call_input"
            yield self._event(f"{kind}.delta", delta=item["input"], **place)
            yield self._event(f"{kind}.done", input=item["input"], **place)
        else:
            part = item["content"][0]
            part["text"] = text
            more = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            place = self._place()
            yield self._event(f"response.{part['type']}.done", text=text, **place, **more)
            yield self._event("response.content_part.done", part=part, **place)
        yield self._event("response.output_item.done", item=item, output_index=self._index)

    def _name(self, prefix: str) -> str:
        return f"{prefix}_{self._answers.journal.name('item', len(self._items))}"

    @property
    def _index(self) -> int:
        return len(self._items) - 1

    def _place(self, *, content: bool = True) -> dict[str, Any]:
        place = {"item_id": self._items[-1]["id"], "output_index": self._index}
        return place | {"content_index": 0} if content else place

    def _event(self, kind: str, **data: Any) -> str:
        body = {"type": kind, "sequence_number": self._sequence} | data
        self._sequence += 1
        return event(json.dumps(body, ensure_ascii=False), kind)


_PREFIX = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}


def _part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt,
        "input_tokens_details": {"cached_tokens": used.cached, "cache_write_tokens": 0},
        "output_tokens": used.generated,
        "output_tokens_details": {"reasoning_tokens": used.reasoning},
        "total_tokens": used.prompt + used.generated,
    }
