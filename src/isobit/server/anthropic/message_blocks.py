"""How ``/v1/messages`` writes an answer: blocks, and the events by which they grow."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

from isobit.server.answer.answers import Answers, event
from isobit.server.answer.choices import Piece
from isobit.server.errors import anthropic_body
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

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageWriter:
    """One answer. As an encoder it streams; what it has gathered is the answer at once."""

    def __init__(self, service: Service, answers: Answers, n_prompt: int) -> None:
        """``n_prompt``: tokens of the prompt."""
        self._answers = answers
        self._n_prompt = n_prompt
        self._head = {
            "id": f"msg_{answers.journal.name()}",
            "type": "message",
            "role": "assistant",
            "model": service.name,
            "system_fingerprint": service.fingerprint,
        }
        self._blocks: list[dict[str, Any]] = []
        self._open = False  # the last of them still grows
        self._text: list[str] = []  # of it
        self._finish: Finish | None = None

    def message(self, used: Usage) -> dict[str, Any]:
        """All of it as it is now."""
        return {
            **self._head,
            "content": self._blocks,
            **self._stop(),
            "usage": _usage(used),
            **(self._answers.receipt(0) if self._finish else {}),
        }

    def begin(self) -> Iterator[str]:
        """A message without content."""
        yield _event("message_start", message=self.message(Usage(self._n_prompt, 0, 0)))

    def piece(self, piece: Piece) -> Iterator[str]:
        """What is new."""
        for what in piece.events:
            yield from self._read(what)

    def ping(self) -> str:
        """The interface's own."""
        return _event("ping")

    def end(self, used: Usage) -> Iterator[str]:
        """Why it ended, and what it took."""
        receipt = self._answers.receipt(0)
        yield _event("message_delta", delta=self._stop(), usage=_usage(used), **receipt)
        yield _event("message_stop")

    def error(self, message: str) -> Iterator[str]:
        """An error in place of the rest."""
        yield event(json.dumps(anthropic_body(message)), "error")

    def _stop(self) -> dict[str, Any]:
        if self._finish is None:
            return {"stop_reason": None, "stop_sequence": None}
        reason, stop = _REASONS[self._finish.reason], self._finish.stop
        reason = "stop_sequence" if stop is not None else reason
        return {"stop_reason": reason, "stop_sequence": stop}

    def _read(self, what: Event) -> Iterator[str]:
        match what:
            case Text(text):
                yield from self._into({"type": "text", "text": "", "citations": None})
                yield self._grow("text_delta", "text", text)
            case Reasoning(text):
                yield from self._into({"type": "thinking", "thinking": "", "signature": ""})
                yield self._grow("thinking_delta", "thinking", text)
            case CallBegins(_, id_, name):
                yield from self._into({"type": "tool_use", "id": id_, "name": name, "input": {}})
            case CallArguments(_, arguments):
                yield self._grow("input_json_delta", "partial_json", arguments)
            case CallEnds():
                yield from self._close()
            case Finish():
                self._finish = what
                yield from self._close()

    def _into(self, block: dict[str, Any]) -> Iterator[str]:
        """Have a block of this kind grow; a call is always another one."""
        kind = block["type"]
        if self._open and kind != "tool_use" and self._blocks[-1]["type"] == kind:
            return
        yield from self._close()
        self._blocks.append(block)
        self._open, self._text = True, []
        yield _event("content_block_start", index=self._index, content_block=block)

    def _grow(self, kind: str, name: str, text: str) -> str:
        self._text.append(text)
        return _event("content_block_delta", index=self._index, delta={"type": kind, name: text})

    def _close(self) -> Iterator[str]:
        if not self._open:
            return
        self._open = False
        block, text = self._blocks[-1], "".join(self._text)
        if block["type"] == "tool_use":
            # One that max_tokens cut has what is there, as a client's reading of the stream has.
            block["input"] = from_json(text, allow_partial=True) if text else {}
        else:
            block[block["type"]] = text
        yield _event("content_block_stop", index=self._index)

    @property
    def _index(self) -> int:
        return len(self._blocks) - 1


def _event(kind: str, **data: Any) -> str:
    return event(json.dumps({"type": kind} | data, ensure_ascii=False), kind)


def _usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt - used.cached,
        "cache_read_input_tokens": used.cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": used.generated,
    }
