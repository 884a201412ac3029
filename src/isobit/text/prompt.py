"""From a conversation to a prompt: the one way of the Python interface, commands and server.

What a model's template has no words for is told in plain messages, and what it cannot write of
messages is put so that it can.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from isobit.errors import UsageError
from isobit.text import plain
from isobit.text.conversation import forms, left_out, normalised
from isobit.text.messages import plain_value, require_mappings
from isobit.text.template import ChatPrompt, chat_prompt, template_of
from isobit.text.tokenizer import Tokenizer

THINKING = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
)
"""Tags that thinking begins and ends with, in some model's template."""


def knows(template: str, name: str) -> bool:
    """Whether a template has a word for something: ``tools``, ``tool_calls``."""
    return re.search(rf"\b{name}\b", template) is not None


def conversation_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> ChatPrompt:
    """A conversation's text and token ids; ``variables`` are those of ``chat_prompt``.

    Raises UsageError for what ``chat_prompt`` refuses, and if the template leaves out a text.
    """
    require_mappings("tools", tools)
    found = normalised(messages)
    template = template_of(tokenizer.vocabulary, tools=bool(tools))
    if not knows(template, "tool_calls"):
        found = plain.without_calls(found)
    if tools and not knows(template, "tools"):
        found, tools = plain.with_tools(found, plain_value(tools, "tools")), None
    closes = next((closes for _, closes in THINKING if closes in template), "")
    refusal: UsageError | None = None
    for each in forms(found):
        try:
            prompt = chat_prompt(tokenizer, each, tools=tools, **variables)
        except UsageError as error:
            refusal = refusal or error
            continue
        missing = left_out(each, prompt.text, closes)
        if missing is None:
            return prompt
        refusal = refusal or UsageError(
            f"messages[{missing}]: expected what the model's chat template writes, found that it "
            "leaves out a text"
        )
    assert refusal is not None
    raise refusal
