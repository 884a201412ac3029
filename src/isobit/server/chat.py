"""From a chat that a client asks for to what the engine is asked, whatever interface it came by.

An interface that is not OpenAI's chat makes a :class:`ChatRequest` of its own request, and has the
same prompt, limits and events.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from isobit.runtime.model import Model
from isobit.server.reading import Reader, TextReader
from isobit.server.requests import ChatRequest


@dataclass(frozen=True)
class Chat:
    """A chat, checked and ready to be answered."""

    prompt: list[int]

    def reader(self) -> Reader:
        """For one choice."""
        return TextReader()


async def prepared(model: Model, asked: ChatRequest) -> Chat:
    """Everything of it that can be refused is refused here: UsageError, naming the field."""
    messages = asked.prepared()
    ids = await asyncio.to_thread(
        model.chat_ids,
        messages,
        tools=asked.tools,
        chat_template_kwargs=asked.chat_template_kwargs,
    )
    return Chat(ids)
