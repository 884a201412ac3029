"""Messages for a chat template: checked, in plain types, and as transformers prepares them.

Whoever writes templates tries them in transformers, which changes messages before a template sees
them (5.24, ``apply_chat_template``): objects become mappings, keys that are None are left out, and
reasoning is given by all of its names. Beyond that, what OpenAI's interface allows and a template
does not know is put into the form that it does know: parts of content are joined, and a call's
arguments are read where they come as text. Which forms a template knows is found by trying.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np

from isobit.errors import UsageError, shown

MAX_BYTES = 4 * 1024 * 1024  # of all messages, and of what is rendered from them

MAX_DEPTH = 100
MAX_BITS = 14_000  # of an integer: Python reads and writes 4,300 digits

REASONING = ("reasoning_content", "thinking", "reasoning")  # the first that is there counts

NAMES = frozenset(
    {
        *("messages", "tools", "documents", "add_generation_prompt", "enable_thinking"),
        *("role", "content", "name", "type", "text", "id", "tool_calls", "tool_call_id"),
        *("function", "arguments", "description", "parameters", "properties", "required"),
        *REASONING,
    }
)
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "text")

# Whether a template, given these variables, writes what is expected.
Trial = Callable[[dict[str, Any], Callable[[str], bool]], bool]


def template_variables(
    messages: object,
    *,
    add_generation_prompt: bool,
    tools: object = None,
    documents: object = None,
    **variables: object,
) -> dict[str, Any]:
    """A template's variables in plain types, after all checks.

    Raises:
        UsageError: one of them is malformed or they are too long; it names which.
    """
    require_mappings("tools", tools)
    require_mappings("documents", documents)
    plain = {
        **{name: plain_value(value, name) for name, value in variables.items()},
        "tools": plain_value(tools, "tools"),
        "documents": plain_value(documents, "documents"),
        "messages": [_message(m, f"messages[{i}]") for i, m in enumerate(plain_messages(messages))],
        "add_generation_prompt": bool(add_generation_prompt),
    }
    size = sum(len(text.encode("utf-8", "surrogatepass")) for text in strings(plain))
    if size > MAX_BYTES:
        raise UsageError(f"messages: expected at most {MAX_BYTES} bytes, found {size}")
    return plain


def require_mappings(name: str, value: object) -> None:
    """Raise UsageError for what is no list of mappings, nor None."""
    if value is not None and not (
        is_list(value) and all(isinstance(_mapped(item), Mapping) for item in value)
    ):
        raise UsageError(f"{name}: expected a list of mappings or None, found {shown(value)}")


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Messages in JSON's types, each with a role; keys that are None are left out.

    They may be mappings, data classes or models of pydantic, in a list or in an object that has
    one as its ``messages``. Raises UsageError, which names the message.
    """
    messages = getattr(messages, "messages", messages)
    if not is_list(messages) or not messages:
        raise UsageError(
            f"messages: expected a list of at least one message, found {shown(messages)}"
        )
    return [_plain_message(m, f"messages[{i}]") for i, m in enumerate(messages)]


def _plain_message(value: object, where: str) -> dict[str, Any]:
    value = _mapped(value)
    if not isinstance(value, Mapping):
        raise UsageError(f'{where}: expected a mapping with a "role", found {shown(value)}')
    if not isinstance(value.get("role"), str):
        raise UsageError(f"{where}.role: expected a text, found {shown(value.get('role'))}")
    kept = {key: item for key, item in value.items() if item is not None}
    return plain_value(kept, where)  # type: ignore[no-any-return]


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message as transformers prepares it, if its content can be written."""
    content = message.get("content")
    if isinstance(content, list):
        for part in content:
            if _text_of(part) is None:
                kind = part.get("type") if isinstance(part, dict) else part
                raise UsageError(f"{where}: expected parts of text alone, found {shown(kind)}")
    elif not isinstance(content, str) and not any(
        message.get(key) for key in ("tool_calls", *REASONING)
    ):
        raise UsageError(f'{where}: expected "content" as a string, found {shown(content)}')
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def adapted(plain: dict[str, Any], trial: Trial) -> dict[str, Any]:
    """The variables with messages in the forms that a template knows."""
    messages = plain["messages"]
    if any(isinstance(m.get("content"), list) for m in messages) and not _knows_parts(trial):
        messages = [_joined(message) for message in messages]
    if any(isinstance(f.get("arguments"), str) for m in messages for f in _functions(m)):
        text, read = _call('{"needle": "hay"}'), _call({"needle": "hay"})
        if not trial(text, lambda out: '{"needle": "hay"}' in out) and trial(
            read, lambda out: "needle" in out
        ):
            messages = [_with_read_arguments(message) for message in messages]
    return {**plain, "messages": messages}


def _knows_parts(trial: Trial) -> bool:
    variables = with_user([{"type": "text", "text": "needle"}])
    return trial(variables, lambda out: "needle" in out and "type" not in out)


def with_user(content: Any) -> dict[str, Any]:
    """Variables with one message, as a template finds them easiest."""
    messages = [{"role": "user", "content": content}]
    return {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}


def _call(arguments: Any) -> dict[str, Any]:
    variables = with_user("x")
    call = {"id": "call00001", "type": "function"}
    call["function"] = {"name": "f", "arguments": arguments}  # type: ignore[assignment]
    variables["messages"].append({"role": "assistant", "content": "", "tool_calls": [call]})
    return variables


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return message
    return {**message, "content": "\n".join(str(_text_of(part)) for part in content)}


def _text_of(part: Any) -> str | None:
    if isinstance(part, dict) and part.get("type", "text") == "text":
        part = part.get("text")
    return part if isinstance(part, str) else None


def _functions(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    calls = [call for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def _with_read_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The same message, which is a copy of the caller's already, with arguments that were text."""
    for function in _functions(message):
        try:
            read = json.loads(function.get("arguments"))  # type: ignore[arg-type]
        except (TypeError, ValueError, RecursionError):
            continue
        if isinstance(read, dict):
            function["arguments"] = read
    return message


def strings(value: Any) -> Iterable[str]:
    """Every string in a plain value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def replaced(value: Any, table: dict[int, str]) -> Any:
    """A copy of a plain value with characters replaced in every string but the usual names.

    Those (``role`` and the like as keys, ``assistant`` and the like as their values) say nothing
    that a message could choose, and templates look for them.
    """
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, dict):
        return {
            key if key in NAMES else replaced(key, table): item
            if key in ("role", "type") and item in ROLES
            else replaced(item, table)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [replaced(item, table) for item in value]
    return value


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether it is a sequence, and no text."""
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _mapped(value: object) -> object:
    """A data class or a model of pydantic as a mapping; all else as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    dump = None if isinstance(value, type) else getattr(value, "model_dump", None)
    return dump() if callable(dump) else value


def plain_value(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of a value in JSON's types, or UsageError."""
    if depth > MAX_DEPTH:
        raise UsageError(f"{where}: expected lists a few levels deep, found more than {MAX_DEPTH}")
    value = _mapped(value.item() if isinstance(value, np.generic) else value)
    if value is None or isinstance(value, bool):
        return value
    # Of a subclass, with methods that a template could call, the plain value.
    if isinstance(value, str):
        return str.__str__(value)  # str() of an enumeration's member is its name
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise UsageError(f"{where}: expected numbers that JSON can hold, found {shown(value)}")
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        found = {}
        for key, item in value.items():
            plain_key = plain_value(key, where, depth + 1)
            if isinstance(plain_key, (list, dict)):
                raise UsageError(f"{where}: expected texts as keys, found {shown(key)}")
            found[plain_key] = plain_value(item, where, depth + 1)
        return found
    if is_list(value):
        return [plain_value(item, where, depth + 1) for item in value]
    raise UsageError(f"{where}: expected JSON types, found {type(value).__name__}")
