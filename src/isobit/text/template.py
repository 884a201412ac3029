"""Chat templates: from messages to the text, or the token ids, of a prompt.

Has the template rendered, and keeps what the messages say apart from what the template says.

A message can hold the text ``<|im_start|>system``; it must not begin a system turn. Marking where
a message begins and ends in the rendered text would not do, since templates cut, trim and search
their messages. Instead each control token in the rendered text gets a guard, one of its own
characters ("|" for all of Qwen's), and the template is rendered again with a stand-in for this
character in every string of the messages, tools and variables but the names of roles and keys: a
symbol that occurs nowhere else in this prompt. Where both texts are the same but for stand-ins, a
control token with its true guard comes from the template, whatever was cut out or joined; the
rest is ordinary text. Where they are not, the template looks for that character ("<" in
"</think>"), and another of the token's is tried. This is sound for any template; a prompt is
refused in the rare case that all characters of a control token that stands in it are looked for.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from isobit.errors import ModelRefused, UsageError, shown
from isobit.text.messages import adapted, replaced, strings, template_variables, with_user
from isobit.text.renderer import RENDERER, TemplateFailed
from isobit.text.tokenizer import COUNTED, Tokenizer, too_long
from isobit.text.vocabulary import Vocabulary

# For a file with no template of its own: ChatML, as Qwen's models know it.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

STAND_INS = range(0x2801, 0x2900)  # Braille patterns: one code point, printable, without case

SEARCH_SECONDS = 5.0  # for the message that a template cannot render
GUARD_SECONDS = 10.0  # for all renderings with stand-ins; usually there is one, of milliseconds


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    **variables: Any,
) -> str:
    """The text of a prompt, as transformers' ``apply_chat_template`` renders it.

    Control tokens in messages are not told from the template's here: use ``encode_chat`` for the
    ids that a model gets.

    Args:
        template: Jinja source, at most 256 Ki characters.
        messages: mappings (or data classes, or models of pydantic) with "role" and "content", a
            text or parts of text, and what else the template asks for, such as "tool_calls".
        add_generation_prompt: end with the beginning of the assistant's answer.
        bos_token, eos_token: texts of these tokens, for the template.
        tools: descriptions of functions the model may call, or None.
        documents: texts that the answer may cite, or None.
        variables: more variables for the template, such as ``enable_thinking``.

    Raises:
        UsageError: the messages are malformed, too long, or refused by the template, or it
            cannot render one of them, which is named.
        ModelRefused: the template is damaged or hostile, or takes too much time or memory.
    """
    context = template_variables(
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        **variables,
    )
    return _Rendering(template, context, {"bos_token": bos_token, "eos_token": eos_token}).text


@dataclass(frozen=True)
class ChatPrompt:
    """A chat as a model gets it."""

    ids: list[int]
    text: str
    """What the template wrote."""


def encode_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **arguments: Any
) -> list[int]:
    """The token ids of :func:`chat_prompt`, which says more."""
    return chat_prompt(tokenizer, messages, **arguments).ids


def chat_prompt(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    documents: Sequence[Any] | None = None,
    most: int | None = None,
    **variables: Any,
) -> ChatPrompt:
    """A chat's text and its token ids; only the template makes control tokens, never a message.

    Uses the template of the model's file, else CHATML. Arguments and errors are those of
    ``render_chat``; ``most`` is that of ``Tokenizer.encode``.
    """
    vocabulary = tokenizer.vocabulary
    context = template_variables(
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        documents=documents,
        **variables,
    )
    special = {
        name: "" if i is None else vocabulary.tokens[i]
        for name, i in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id))
    }
    rendering = _Rendering(template_of(vocabulary, tools=bool(tools)), context, special)
    marked, back = _guarded(rendering, tokenizer)
    ids: list[int] = []
    for piece in tokenizer.split_special(marked):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            plain = piece.translate(back)
            ids += tokenizer.encode(plain, special=False, bos=False, most=most)
        if most is not None and len(ids) > COUNTED * most:
            raise too_long(most, len(ids), counted=False)
    if vocabulary.add_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
        ids.insert(0, vocabulary.bos_id)
    if most is not None and len(ids) > most:
        raise too_long(most, len(ids))
    return ChatPrompt(ids, rendering.text)


def template_of(vocabulary: Vocabulary, *, tools: bool = False) -> str:
    """The chat template of a model's file, the one for tools if it has one; else CHATML.

    Raises ModelRefused if there is none, and CHATML would not do.
    """
    template = vocabulary.chat_template
    if tools and vocabulary.tool_template is not None:
        template = vocabulary.tool_template
    if template is None:
        if not {"<|im_start|>", "<|im_end|>"} <= vocabulary.control.keys():
            raise ModelRefused(
                f"{vocabulary.source}: tokenizer.chat_template: expected a chat template, or the "
                "control tokens <|im_start|> and <|im_end|> for the default, found neither"
            )
        return CHATML
    return template


class _Rendering:
    """A template's text for some variables, and for these with a character replaced."""

    def __init__(self, template: str, context: dict[str, Any], special: dict[str, str]) -> None:
        """Render; UsageError where a message or variable is at fault, else ModelRefused."""
        self.template = template
        self._special = special
        self._now = time.time()
        self.context = adapted(context, lambda *trial: _tried(template, *trial))
        try:
            self.text = self._render(self.context)
        except TemplateFailed as error:
            self._blame(error)
            raise

    def with_stand_in(self, character: str, stand_in: str) -> str | None:
        """The text with a stand-in where variables gave this character; None if it is another."""
        try:
            text = self._render(replaced(self.context, {ord(character): stand_in}))
        except (TemplateFailed, UsageError):  # it asked for that character
            return None
        return text if text.replace(stand_in, character) == self.text else None

    def _render(self, context: dict[str, Any]) -> str:
        [text] = RENDERER.render(self.template, [{**context, **self._special}], self._now)
        return text

    def _blame(self, error: TemplateFailed) -> None:
        """Raise UsageError if the template renders other messages, naming the one it cannot."""

        def fails(context: dict[str, Any]) -> bool:
            try:
                self._render(context)
            except TemplateFailed as again:
                return again.reason == error.reason
            except UsageError:
                pass
            return False

        until = time.monotonic() + SEARCH_SECONDS
        if fails(with_user("x")):
            return
        what = "messages"
        if fails({**self.context, **{"messages": with_user("x")["messages"]}}):
            what = "tools, documents or variables"
        else:
            messages = self.context["messages"]
            for i in range(len(messages)):
                if time.monotonic() > until:
                    break
                if fails({**self.context, "messages": messages[: i + 1]}):
                    what = f"messages[{i}]"
                    break
        raise UsageError(
            f"{what}: expected what the model's chat template can render, found {error.reason}"
        ) from None


@lru_cache(maxsize=64)
def _tried_text(template: str, variables: str) -> str | None:
    context = json.loads(variables)
    with suppress(UsageError, ModelRefused):
        return RENDERER.render(template, [{**context, "bos_token": "", "eos_token": ""}])[0]
    return None


def _tried(template: str, variables: dict[str, Any], expected: Callable[[str], bool]) -> bool:
    """Whether a template renders these variables as expected."""
    text = _tried_text(template, json.dumps(variables))
    return text is not None and expected(text)


def _guarded(rendering: _Rendering, tokenizer: Tokenizer) -> tuple[str, dict[int, str]]:
    """The text with stand-ins in it, so that its control tokens are the template's; the way back.

    Raises:
        UsageError: for a control token in it, none of its characters can be a guard.
        TemplateFailed: it takes too long to find them.
    """
    until = time.monotonic() + GUARD_SECONDS
    used = set(rendering.template).union(*strings(rendering.context))
    free = [chr(c) for c in STAND_INS if chr(c) not in used]
    control = {i: text for text, i in tokenizer.vocabulary.control.items()}
    marked, guards, useless = rendering.text, set[str](), set[str]()
    back: dict[int, str] = {}
    while True:
        found = {control[i] for i in tokenizer.split_special(marked) if i in control}
        bare = [token for token in sorted(found) if guards.isdisjoint(token)]
        if not bare:
            return marked, back
        candidates = set(bare[0]) - useless
        if not candidates:
            messages = rendering.context["messages"]
            which = (i for i, m in enumerate(messages) if any(bare[0] in s for s in strings(m)))
            where = next((f"messages[{i}]" for i in which), "messages")
            raise UsageError(
                f"{where}: expected no {shown(bare[0])} there, as the model's chat template looks "
                "for each of its characters"
            )
        if not free:
            raise UsageError("messages: expected a Braille pattern that is not in them, found none")
        if time.monotonic() > until:
            raise TemplateFailed(
                f"its control tokens are not told from those in messages within {GUARD_SECONDS:g} s"
            )
        guard = min(candidates, key=lambda c: (c not in "|｜", c.isalnum(), c in "<>/_", c))
        stand_in = free.pop(0)
        text = rendering.with_stand_in(guard, stand_in)
        if text is None:
            useless.add(guard)
            continue
        guards.add(guard)
        back[ord(stand_in)] = guard
        both = zip(text, marked, strict=True)
        marked = "".join([stand_in if c == stand_in else old for c, old in both])
