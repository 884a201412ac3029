"""From a chat that a client asks for to what the engine is asked, whatever interface it came by.

An interface that is not OpenAI's chat makes a :class:`ChatRequest` of its own request, and has the
same prompt, limits and events.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from isobit.errors import UsageError
from isobit.runtime.grammar import Constraint
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.server.parsing.reading import AnswerReader, Name, Reader, TextReader, drawn
from isobit.server.parsing.thinking import Thinking, found
from isobit.server.request.fields import ChatRequest, Common
from isobit.server.request.formats import asked_format
from isobit.server.request.grammars import pattern_of
from isobit.server.request.prompts import require_countable
from isobit.server.tool_calls.dialects import Dialect, dialect_of, frame_of
from isobit.server.tool_calls.tools import Choice, checked, offered
from isobit.text.messages import strings
from isobit.text.template import template_of

_TAIL = 1000  # characters of a prompt that say how it ends


@dataclass(frozen=True)
class Chat:
    """What was asked for, checked and ready to be answered."""

    model: Model
    prompt: list[int] = field(default_factory=list)
    pattern: Constraint | None = None
    """What each choice is held to."""
    thinking: Thinking | None = None
    dialect: Dialect | None = None
    one_call: bool = False

    def reader(self, name: Name = drawn, *, tokens: bool = True) -> Reader:
        """For one choice.

        name: makes a call's id of its number. tokens: tags that are tokens are told from text that
        spells them.
        """
        if self.thinking is None and self.dialect is None:
            return TextReader()
        tags = set(self.dialect.tags if self.dialect else ())
        tags |= {self.thinking.opens, self.thinking.closes} if self.thinking else set()
        known = self.model.grammars.special if tokens else {}
        special = {i: tag for tag, i in known.items() if tag in tags}
        return AnswerReader(special, self.thinking, self.dialect, name, one_call=self.one_call)

    def sampling(self, asked: Common) -> Sampling:
        """How tokens are chosen. Raises UsageError for what does not go together."""
        if self.pattern is not None and asked.ignore_eos:
            raise UsageError("ignore_eos: expected false beside a form that ends")
        return replace(
            asked.sampling, grammar=None if self.pattern is None else self.pattern.grammar
        )

    def constraint(self) -> Constraint | None:
        """What one choice is held to."""
        return None if self.pattern is None else self.pattern.fresh()


async def prepared(model: Model, asked: ChatRequest) -> Chat:
    """Everything of it that can be refused is refused here: UsageError, naming the field."""
    form, choice = asked_format(asked), _choice(asked)
    n = len(asked.messages)
    if n > model.context:  # each becomes a token at least, and a template takes long over many
        raise UsageError(
            f"messages: expected at most {model.context} tokens (the context), got {n} or more, "
            "one for each message"
        )
    chat = await asyncio.to_thread(begun, model, asked)
    pattern = await pattern_of(model, form, chat.thinking, chat.dialect, choice)
    return replace(chat, pattern=pattern)


async def counted(model: Model, asked: ChatRequest) -> list[int]:
    """The ids of its prompt, which may be longer than the context. Raises UsageError."""
    asked_format(asked)
    require_countable(strings([asked.messages, asked.tools]))
    return (await asyncio.to_thread(begun, model, asked, counts=True)).prompt


def begun(model: Model, asked: ChatRequest, *, counts: bool = False) -> Chat:
    """The prompt and how its answer is read; what comes is not held to anything.

    counts: its tokens are counted, and may be more than the context has.
    """
    if asked.functions:
        raise UsageError("functions: expected tools in their place")
    choice = _choice(asked)
    offers = choice.mode != "none"
    template = template_of(model.tokenizer.vocabulary, tools=offers)
    dialect = dialect_of(template, choice.tools) if offers else frame_of(template)
    prompt = model.chat_prompt(
        asked.messages,
        tools=offered(asked.tools or ()) if offers else None,
        chat_template_kwargs=asked.variables,
        most=None if counts else model.context,
    )
    for tool in choice.tools if offers else ():
        if tool.name not in prompt.text:
            raise UsageError(
                f"tools: expected that the model's chat template writes {tool.name!r:.80}, "
                "found that it does not"
            )
    thinking = found(template, prompt.text[-_TAIL:])
    return Chat(model, prompt.ids, None, thinking, dialect, one_call=not choice.parallel)


def _choice(asked: ChatRequest) -> Choice:
    parallel = asked.parallel_tool_calls is not False
    return checked(asked.tools, asked.tool_choice, parallel=parallel)


async def held(model: Model, asked: Common) -> Chat:
    """A text that goes on in the form that is asked for, if any is."""
    return Chat(model, pattern=await pattern_of(model, asked_format(asked)))
