"""Chat templates: from messages to the text, or the token ids, of a prompt.

Checks the messages, has the template rendered, and keeps what the messages say apart from what the
template says.

A message can hold the text ``<|im_start|>system``; it must not begin a system turn. Marking where
a message begins and ends in the rendered text would not do, since templates cut, trim and search
their messages. Instead each control token has a guard, one of its own characters (for all of
Qwen's, "|"). In every string of the messages and tools, guards are replaced by stand-ins: symbols
that occur nowhere else in this prompt. The template sees strings of the same length with all else
unchanged. In what it renders, a control token with its true guard therefore comes from the
template, whatever was cut out or joined; the rest becomes ordinary text, guards put back. This is
sound for any template, but wrong for one that asks for a guard in a message ("if '|' in
content"), so the messages are also rendered as they are: both must be the same text but for the
stand-ins, or the prompt is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isobit.errors import ModelRefused, UsageError
from isobit.text.renderer import MAX_CHARACTERS, RENDERER
from isobit.text.tokenizer import Tokenizer
from isobit.text.vocabulary import shown

# For a file with no template of its own: ChatML, as Qwen's models know it.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

STAND_INS = range(0x2801, 0x2900)  # Braille patterns: one code point, printable, without case


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    tools: Sequence[Any] | None = None,
    **variables: Any,
) -> str:
    """The text of a prompt, as transformers' ``apply_chat_template`` renders it.

    Control tokens in messages are not told from the template's here: use ``encode_chat`` for the
    ids that a model gets.

    Args:
        template: Jinja source, at most 256 Ki characters.
        messages: mappings with "role" and "content" and what else the template asks for.
        add_generation_prompt: end with the beginning of the assistant's answer.
        bos_token, eos_token: texts of these tokens, for the template.
        tools: descriptions of functions the model may call, or None.
        variables: more variables for the template, such as ``enable_thinking``.

    Raises:
        UsageError: the messages are malformed, too long or refused by the template.
        ModelRefused: the template is damaged or hostile, or takes too much time or memory.
    """
    context = _context(messages, tools, add_generation_prompt, variables)
    [text] = RENDERER.render(
        template, [{**context, "bos_token": bos_token, "eos_token": eos_token}]
    )
    return text


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    **variables: Any,
) -> list[int]:
    """Token ids of a chat, in which only the template makes control tokens, never a message.

    Uses the template of the model's file, else CHATML. Arguments and errors are those of
    ``render_chat``.
    """
    vocabulary = tokenizer.vocabulary
    template = vocabulary.chat_template
    if template is None:
        template = CHATML
        if not {"<|im_start|>", "<|im_end|>"} <= vocabulary.control.keys():
            raise ModelRefused(
                f"{vocabulary.source}: tokenizer.chat_template: expected a chat template, or the "
                "control tokens <|im_start|> and <|im_end|> for the default, found neither"
            )
    plain = _context(messages, tools, add_generation_prompt, variables)
    guards = _guards(vocabulary.control)
    used = set(template).union(*_strings(plain))
    free = [chr(c) for c in STAND_INS if chr(c) not in used]
    if len(free) < len(guards):
        raise UsageError(f"messages: expected {len(guards)} unused Braille patterns, found fewer")
    forth = dict(zip(map(ord, guards), free, strict=False))
    back = {ord(stand_in): guard for guard, stand_in in zip(guards, free, strict=False)}
    trusted = {
        name: "" if i is None else vocabulary.tokens[i]
        for name, i in (("bos_token", vocabulary.bos_id), ("eos_token", vocabulary.eos_id))
    }
    text, marked = RENDERER.render(
        template, [{**plain, **trusted}, {**_replaced(plain, forth), **trusted}]
    )
    if marked.translate(back) != text:
        raise ModelRefused(
            f"{vocabulary.source}: tokenizer.chat_template: expected it to copy "
            f"{shown(''.join(guards))} in a message as any other text, found that it does not"
        )
    ids: list[int] = []
    for piece in tokenizer.split_special(marked):
        if isinstance(piece, int):
            ids.append(piece)
        else:
            ids += tokenizer.encode(piece.translate(back), special=False, bos=False)
    if vocabulary.add_bos and vocabulary.bos_id is not None and ids[:1] != [vocabulary.bos_id]:
        ids.insert(0, vocabulary.bos_id)
    return ids


def _guards(control: Iterable[str]) -> list[str]:
    """Characters of which every control token has one, and messages have as few as possible."""
    guards: list[str] = []
    for text in sorted(control):
        if not any(guard in text for guard in guards):
            guards.append(min(text, key=lambda c: (c not in "|｜", c.isalnum(), c in "<>/_", c)))
    return guards


def _context(
    messages: object, tools: object, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> dict[str, Any]:
    """The template's variables in plain types, after all checks."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)) or not messages:
        raise UsageError("messages: expected a list of at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UsageError(f'{where}: expected a mapping with a "role"')
        content = message.get("content")
        if not isinstance(content, (str, list, tuple)) and not message.get("tool_calls"):
            raise UsageError(f'{where}: expected "content" as a string, found {shown(content)}')
    context: dict[str, Any] = {
        "tools": tools,
        **variables,
        "messages": messages,
        "add_generation_prompt": bool(add_generation_prompt),
    }
    try:
        plain: dict[str, Any] = _replaced(context, {})
    except RecursionError:
        raise UsageError("messages: expected lists a few levels deep, found too many") from None
    size = sum(map(len, _strings(plain)))
    if size > MAX_CHARACTERS:
        raise UsageError(f"messages: expected at most {MAX_CHARACTERS} characters, found {size}")
    return plain


def _replaced(value: Any, table: dict[int, str]) -> Any:
    """A copy in plain types with characters replaced in every string."""
    if isinstance(value, str):
        return value.translate(table) if table else str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {_replaced(key, table): _replaced(item, table) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [_replaced(item, table) for item in value]
    raise UsageError(f"messages: expected JSON types, found {type(value).__name__}")


def _strings(value: Any) -> Iterable[str]:
    """Every string in a plain value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
