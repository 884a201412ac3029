"""Messages as clients and programs give them, put into the forms that templates know.

What a server's client says must reach the model: a text that the template leaves out is refused
with the index of its message.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic_core import from_json

from isobit.errors import UsageError
from isobit.text.messages import REASONING, plain_messages

_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalised(messages: object) -> list[dict[str, Any]]:
    """Messages with known roles, texts as contents, and arguments of calls as JSON objects.

    They may be what ``plain_messages`` takes. Raises UsageError, which names the message.
    """
    plain = enumerate(plain_messages(messages))
    return [_message(message, f"messages[{i}]") for i, message in plain]


def _message(found: dict[str, Any], where: str) -> dict[str, Any]:
    role = _ROLES.get(found["role"], found["role"])
    if role in ("system", "user") and "content" not in found:  # others may have calls alone
        raise UsageError(f"{where}.content: expected a text or its parts, found none")
    found |= {"role": role, "content": _text(found.get("content"), f"{where}.content")}
    if (old := found.pop("function_call", None)) is not None:
        found.setdefault("tool_calls", [{"function": old}])
    calls = found.pop("tool_calls", None)
    if not isinstance(calls, list | None):
        raise UsageError(f"{where}.tool_calls: expected a list, got {calls!r:.60}")
    if calls:
        found["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{n}].function") for n, call in enumerate(calls)
        ]
    for name in REASONING:
        if not isinstance(found.get(name, ""), str):  # some clients' own, in parts
            del found[name]
    return found


def _text(content: object, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise UsageError(f"{where}: expected a text or its parts, got {content!r:.60}")
    return "\n".join(_part(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else part
    text = part.get(_TEXTS.get(str(kind), "")) if isinstance(part, Mapping) else None
    if not isinstance(text, str):
        raise UsageError(f"{where}: expected a part with text, found {kind!r:.60}")
    return text


def _call(call: object, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping):
        raise UsageError(f"{where}: expected a name and arguments, got {call!r:.60}")
    name = checked_name(function.get("name"), f"{where}.name")
    arguments = checked_arguments(function.get("arguments"), f"{where}.arguments")
    said = json.dumps(arguments, ensure_ascii=False)
    function = {**function, "name": name, "arguments": said}
    return {**call, "type": "function", "function": function}


def checked_name(name: object, where: str) -> str:
    """The name of a function that was called. Raises UsageError."""
    if not isinstance(name, str) or not name:
        raise UsageError(f"{where}: expected the name of a function, got {name!r:.60}")
    return name


def checked_arguments(arguments: object, where: str) -> Mapping[str, Any]:
    """Arguments of a call, which may be a text of JSON, a cut one too. Raises UsageError."""
    if isinstance(text := arguments, str) and text.strip():
        try:
            arguments = json.loads(text, strict=False)
        except (ValueError, RecursionError) as error:
            try:  # of a call that max_tokens cut: what there is of it
                arguments = from_json(text, allow_partial="trailing-strings")
            except ValueError:
                raise UsageError(f"{where}: expected JSON, got: {error}") from None
    arguments = arguments or {}
    if not isinstance(arguments, Mapping):
        raise UsageError(f"{where}: expected an object, got {arguments!r:.60}")
    return arguments


def systems_first(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Messages whose first system messages are one; None if there is no more than one."""
    n = next((i for i, m in enumerate(messages) if m["role"] != "system"), len(messages))
    if n < 2:
        return None
    content = "\n\n".join(filter(None, (m["content"] for m in messages[:n])))
    return [messages[0] | {"content": content}, *messages[n:]]


def one_thing_each(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """Answers with a text and calls as several with one of these; None if there is none.

    For templates, Llama 3's among them, that write no more than one thing of an answer.
    """
    found: list[dict[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls", [])
        bare = {key: value for key, value in message.items() if key != "tool_calls"}
        if message["content"] or not calls:
            found.append(bare)
        found += [bare | {"content": "", "tool_calls": [call]} for call in calls]
    return found if len(found) > len(messages) else None


def forms(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Messages, and what says the same to templates that cannot write them."""
    yield messages
    merged = systems_first(messages)
    if merged is not None:
        yield merged
    for each in (merged, messages):
        if each is not None and (apart := one_thing_each(each)) is not None:
            yield apart


def left_out(messages: Sequence[Mapping[str, Any]], prompt: str, closes: str = "") -> int | None:
    """The first message of which a text is not in the prompt.

    ``closes``: the tag up to which an answer is thinking, which templates leave out of history.
    """
    at = 0
    for i, message in enumerate(messages):
        content = message["content"]
        if closes and message["role"] == "assistant":
            content = content.rpartition(closes)[2]
        for text in (content, *_texts_of_calls(message)):
            found = _found(text, prompt, at)
            if found < 0:
                return i
            at = found
    return None


def _texts_of_calls(message: Mapping[str, Any]) -> Iterator[str]:
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from _leaves(json.loads(call["function"]["arguments"]))


def _leaves(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _found(text: str, prompt: str, start: int) -> int:
    """Where a text is in a prompt, as it is or as JSON writes it; -1 if it is not.

    Looked for from ``start`` on first, since templates keep the order of messages: from the
    beginning, thousands of messages would take the square of their time.
    """
    text = text.strip()
    ways = dict.fromkeys((text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]))
    for first in (start, 0):
        for way in ways:
            if (found := prompt.find(way, first)) >= 0:
                return found
    return -1
