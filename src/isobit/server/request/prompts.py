"""What the bodies of several routes share: prompts are a text, ids, or a list of either."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict

from isobit.errors import UsageError
from isobit.runtime.model import Model


class RequestBody(BaseModel):
    """The body of a request. Fields that it does not have are ignored; true is no number."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())

    @property
    def words(self) -> Mapping[str, str]:
        """Fields as the engine calls them, and their names here, where these are others."""
        return {}


def of_prompt(field: str) -> dict[str, str]:
    """The words of errors about what a prompt consists of."""
    return dict.fromkeys(("prompt", "text", "token id"), field)


SAMPLING = {"repeat_penalty": "repetition_penalty"}
"""The words of errors about how tokens are chosen."""


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_whole)]
"""40.0 is the number 40, and what some languages write for it."""

MOST_COUNTED = 1 << 20
"""Characters whose tokens are counted beyond the context: a second of a processor."""

_SHORT = 500
"""Characters or ids which take less time than to give them to another thread."""

Prompt = str | list[int] | list[str] | list[list[int]]


def require_countable(texts: Iterable[str]) -> None:
    """Raise UsageError for texts that are too long to have their tokens counted."""
    n = sum(map(len, texts))
    if n > MOST_COUNTED:
        raise UsageError(f"prompt: expected at most {MOST_COUNTED} characters to count, got {n}")


def listed(prompt: Prompt, most: int) -> list[str | list[int]]:
    """One or more. Raises UsageError for none and for more than ``most``."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise UsageError("prompt: expected at least one token, got none")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > most:
        raise UsageError(f"prompt: expected at most {most}, got {len(prompt)}")
    return list(prompt)


async def encoded(model: Model, prompts: list[str | list[int]]) -> list[list[int]]:
    """The ids of each; special tokens in a text are recognised. Raises UsageError.

    All are checked before the first is run.
    """

    def ids(prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            prompt = model.tokenizer.encode(prompt, special=True, most=model.context)
        return model.checked(prompt)

    if sum(map(len, prompts)) <= _SHORT:
        return [ids(prompt) for prompt in prompts]
    return await asyncio.to_thread(lambda: [ids(prompt) for prompt in prompts])
