"""The JSON of answers, in OpenAI's shapes."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from isobit.runtime.tokens import Token
from isobit.server.answer.choices import Piece
from isobit.server.parsing.events import (
    Answer,
    CallArguments,
    CallBegins,
    CallEnds,
    Event,
    Finish,
    Reasoning,
    Text,
    Usage,
    gathered,
)
from isobit.text.tokenizer import Tokenizer

LEAST = -9999.0  # what OpenAI says of tokens that are all but impossible


def usage(used: Usage) -> dict[str, Any]:
    """Tokens of a request."""
    return {
        "prompt_tokens": used.prompt,
        "completion_tokens": used.generated,
        "total_tokens": used.prompt + used.generated,
        "prompt_tokens_details": {"cached_tokens": used.cached},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning},
    }


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""
    return {
        "content": [
            {
                **_entry(tokenizer, token.id, token.logprob),
                "top_logprobs": [_entry(tokenizer, i, value) for i, value in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def completion_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[Token], place: Callable[[bytes], int]
) -> dict[str, Any]:
    """Log-probabilities as completions have them; ``place``: where the next bytes of the text are,
    in characters."""
    return {
        "tokens": [_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            (token.top and {_text(tokenizer, i): _finite(value) for i, value in token.top}) or None
            for token in tokens
        ],
        "text_offset": [place(tokenizer.token_bytes(token.id)) for token in tokens],
    }


def _places() -> Callable[[bytes], int]:
    """Of bytes that follow one another: the number of the character that each begin in."""
    decoder, reached = codecs.getincrementaldecoder("utf-8")("replace"), 0

    def place(data: bytes) -> int:
        nonlocal reached
        at = reached
        reached += len(decoder.decode(data))
        return at

    return place


class ChatShape:
    """Answers to ``/v1/chat/completions``."""

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()
        self._held: dict[int, list[Token]] = {}
        """By choice, the tokens that no delta was made of."""

    prefix, object, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice at once."""
        answer = _answer(pieces)
        assert answer.finish is not None
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message |= _reasoning(answer.reasoning)
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return {
            "index": index,
            "message": message,
            "logprobs": self._of([t for piece in pieces for t in piece.tokens]),
            "finish_reason": answer.finish.reason,
        }

    def plain(self, piece: Piece) -> str | None:
        """Its text, if its only part has nothing else that others have not."""
        if self._logprobs or piece.index not in self._begun:
            return None
        return _only_text(piece)

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """A choice's next piece, a delta for each event that says something, with its tokens."""
        parts: list[dict[str, Any]] = []
        held = self._held.setdefault(piece.index, [])

        def part(delta: dict[str, Any], finish: str | None = None) -> None:
            if piece.index not in self._begun:
                self._begun.add(piece.index)
                delta = {"role": "assistant"} | (delta or {"content": ""})
            made = {"index": piece.index, "delta": delta, "logprobs": self._of(held)}
            parts.append(made | {"finish_reason": finish})
            held.clear()

        for event, tokens in zip(piece.events, piece.of_events, strict=True):
            held += tokens
            finish = event.reason if isinstance(event, Finish) else None
            if (delta := _delta(event)) or finish:
                part(delta, finish)
        if piece.index not in self._begun:  # that it has begun
            part({})
        return parts

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, tokens) if self._logprobs else None


class CompletionShape:
    """Answers to ``/v1/completions``; ``echo``: the texts that come before those of the choices."""

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool, echo: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echo = dict(enumerate(echo))
        self._places: dict[int, Callable[[bytes], int]] = {}

    prefix = "cmpl"
    object = chunk = "text_completion"

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice at once."""
        whole = Piece(index, prompt=pieces[0].prompt, end=pieces[-1].end)
        for piece in pieces:
            whole.events += piece.events
            whole.of_events += piece.of_events
        [part] = self.parts(whole)
        return part

    def plain(self, piece: Piece) -> str | None:
        """Its text, if its only part has nothing else that others have not."""
        if self._logprobs or piece.index in self._echo:
            return None
        return _only_text(piece)

    def parts(self, piece: Piece) -> list[dict[str, Any]]:
        """A choice's next piece, if there is more of the text, or it ends."""
        index, logprobs = piece.index, None
        if not (piece.events or piece.prompt):
            return []
        before = self._echo.pop(index, "")
        if self._logprobs:
            place = self._places.setdefault(index, _places())
            # The token that ended it has no text but a place: who scores a prompt by max_tokens 1
            # counts on one more token than the prompt's.
            made = [token for tokens in piece.of_events for token in tokens]
            tokens = [*piece.prompt, *made, *([piece.end] if piece.end else [])]
            logprobs = completion_logprobs(self._tokenizer, tokens, place)
        return [
            {
                "index": index,
                "text": before + "".join(e.text for e in piece.events if isinstance(e, Text)),
                "logprobs": logprobs,
                "finish_reason": piece.finish.reason if piece.finish else None,
            }
        ]


def _only_text(piece: Piece) -> str | None:
    match piece.events:
        case [Text(text)]:
            return text
    return None


def _answer(pieces: Sequence[Piece]) -> Answer:
    return gathered(event for piece in pieces for event in piece.events)


def _reasoning(text: str) -> dict[str, str]:
    return {"reasoning_content": text, "reasoning": text}  # DeepSeek's name, and OpenRouter's


def _delta(event: Event) -> dict[str, Any]:
    """What a chat's stream says of an event; nothing of the ends."""
    match event:
        case Text(text):
            return {"content": text}
        case Reasoning(text):
            return _reasoning(text)
        case CallBegins(call, id_, name):
            function = {"name": name, "arguments": ""}
            return _call({"index": call, "id": id_, "type": "function", "function": function})
        case CallArguments(call, json):
            return _call({"index": call, "function": {"arguments": json}})
        case CallEnds() | Finish():
            return {}


def _call(call: dict[str, Any]) -> dict[str, Any]:
    return {"tool_calls": [call]}


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode(errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; as OpenAI has it where it is no whole characters, so that none are alike."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, LEAST)
