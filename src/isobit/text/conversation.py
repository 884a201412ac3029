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
from isobit.text.messages import is_list, plain_value

_ROLES = {"developer": "system", "function": "tool"}
_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def normalised(messages: object) -> list[dict[str, Any]]:
    """Messages with known roles, texts as contents, and arguments of calls as JSON objects.

    They may be mappings, data classes or models of pydantic. Raises UsageError, which names the
    message.
    """
    messages = getattr(messages, "messages", messages)
    if not is_list(messages) or not messages:
        raise UsageError("messages: expected a list of at least one message")
    plain = [plain_value(m, f"messages[{i}]") for i, m in enumerate(messages)]
    return [_message(message, f"messages[{i}]") for i, message in enumerate(plain)]


def _message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f'{where}: expected a mapping with a "role", got {message!r:.60}')
    role = message.get("role")
    if not isinstance(role, str):
        raise UsageError(f"{where}.role: expected a text, got {role!r:.60}")
    found = {key: value for key, value in message.items() if value is not None}
    role = _ROLES.get(role, role)
    if role in ("system", "user") and "content" not in found:  # others may have calls alone
        raise UsageError(f"{where}.content: expected a text or its parts, found none")
    found |= {"role": role, "content": _text(message.get("content"), f"{where}.content")}
    if (old := found.pop("function_call", None)) is not None:
        found.setdefault("tool_calls", [{"function": old}])
    calls = found.pop("tool_calls", None)
    if not isinstance(calls, list | None):
        raise UsageError(f"{where}.tool_calls: expected a list, got {calls!r:.60}")
    if calls:
        found["tool_calls"] = [
            _call(call, f"{where}.tool_calls[{n}].function") for n, call in enumerate(calls)
        ]
    for name in ("reasoning", "reasoning_content"):
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
    for i, message in enumerate(messages):
        content = message["content"]
        if closes and message["role"] == "assistant":
            content = content.rpartition(closes)[2]
        if not all(_occurs(text, prompt) for text in (content, *_texts_of_calls(message))):
            return i
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


def _occurs(text: str, prompt: str) -> bool:
    """Whether a text is in a prompt, as it is or as JSON writes it."""
    text = text.strip()
    return (
        text in prompt
        or json.dumps(text, ensure_ascii=False)[1:-1] in prompt
        or json.dumps(text)[1:-1] in prompt
    )
