"""The JSON of answers, in OpenAI's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isobit.runtime.tokens import Token
from isobit.server.choices import Choice, Piece
from isobit.text.tokenizer import Tokenizer

LEAST = -9999.0  # what OpenAI says of tokens that are all but impossible


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> Any:
    """An error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompts: Sequence[Sequence[int]], choices: Sequence[Choice]) -> dict[str, Any]:
    """Tokens of prompts, each counted once, and of answers."""
    prompt = sum(map(len, prompts))
    generated = sum(choice.n_tokens for choice in choices)
    cached = sum(choice.generation.request.cached for choice in choices[:1])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
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
    tokenizer: Tokenizer, tokens: Sequence[Token], offset: int
) -> dict[str, Any]:
    """Log-probabilities as completions have them; ``offset``: where the text of these begins."""
    texts = [_text(tokenizer, token.id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            (token.top and {_text(tokenizer, i): _finite(value) for i, value in token.top}) or None
            for token in tokens
        ],
        "text_offset": offsets,
    }


class ChatShape:
    """Answers to ``/v1/chat/completions``."""

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._begun: set[int] = set()

    object, chunk = "chat.completion", "chat.completion.chunk"

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice at once."""
        text = "".join(piece.text for piece in pieces)
        return {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._of([t for piece in pieces for t in piece.tokens]),
            "finish_reason": pieces[-1].finish_reason,
        }

    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice's next piece."""
        delta = {} if piece.index in self._begun else {"role": "assistant"}
        self._begun.add(piece.index)
        return {
            "index": piece.index,
            "delta": delta | {"content": piece.text} if piece.text or delta else delta,
            "logprobs": self._of(piece.tokens),
            "finish_reason": piece.finish_reason,
        }

    def _of(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, tokens) if self._logprobs else None


class CompletionShape:
    """Answers to ``/v1/completions``; ``echo``: the texts that come before those of the choices."""

    def __init__(self, tokenizer: Tokenizer, *, logprobs: bool, echo: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._echo = dict(enumerate(echo))
        self._offsets: dict[int, int] = {}

    object = chunk = "text_completion"

    def whole(self, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A choice at once."""
        tokens = [t for piece in pieces for t in piece.tokens]
        text = "".join(piece.text for piece in pieces)
        return self.part(Piece(index, text, tokens, pieces[-1].finish_reason))

    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice's next piece."""
        index, logprobs = piece.index, None
        before = self._echo.pop(index, "")
        if self._logprobs:
            offset = self._offsets.get(index, 0)  # with an echo the first are the prompt's
            logprobs = completion_logprobs(self._tokenizer, piece.tokens, offset)
            self._offsets[index] = offset + sum(map(len, logprobs["tokens"]))
        return {
            "index": index,
            "text": before + piece.text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
        }


def _entry(tokenizer: Tokenizer, token: int, logprob: float | None) -> dict[str, Any]:
    data = tokenizer.token_bytes(token)
    text = data.decode(errors="replace")
    return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}


def _text(tokenizer: Tokenizer, token: int) -> str:
    return tokenizer.token_bytes(token).decode(errors="replace")


def _finite(value: float | None) -> float | None:
    return None if value is None else max(value, LEAST)
