"""The functions that a request offers, and which of them may or must be called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from isobit.errors import UsageError

MOST_TOOLS = 512
KINDS = frozenset({"string", "integer", "number", "boolean", "null", "array", "object"})


@dataclass(frozen=True)
class Tool:
    """A function that can be called."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The JSON schema of its arguments, an object's."""
    description: str = ""
    strict: bool = False
    """Whether what cannot be enforced of the schema is refused."""

    def parameter(self, name: str) -> Mapping[str, Any] | None:
        """The schema of one argument, by itself; None if there is none."""
        schema = _mapping(self.parameters.get("properties")).get(name)
        if schema is None:
            schema = self.parameters.get("additionalProperties")
        if not isinstance(schema, Mapping):
            return None
        shared = ("$defs", "definitions")  # what its references may mean
        return {**{key: self.parameters[key] for key in shared if key in self.parameters}, **schema}


@dataclass(frozen=True)
class Choice:
    """Which calls an answer may have."""

    mode: Literal["none", "auto", "required"]
    tools: tuple[Tool, ...]
    """Those that may be called."""
    parallel: bool = True


def checked(tools: Sequence[Mapping[str, Any]] | None, choice: object, *, parallel: bool) -> Choice:
    """A request's ``tools`` and ``tool_choice``. Raises UsageError, which names the field."""
    found = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    if len(found) > MOST_TOOLS:
        raise UsageError(f"tools: expected at most {MOST_TOOLS}, got {len(found)}")
    names = [tool.name for tool in found]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"tools[{i}]: expected a name of its own, got {name!r:.80} again")
    every = Choice("auto" if found else "none", tuple(found), parallel)
    if isinstance(choice, Mapping):
        return _named(every, choice)
    if choice in (None, "auto"):
        return every
    if choice == "none":
        return replace(every, mode="none")
    if choice not in ("required", "any"):
        raise UsageError(
            f"tool_choice: expected none, auto, required or a function, got {choice!r:.80}"
        )
    if not found:
        raise UsageError(f"tool_choice: expected tools beside {choice!r}, got none")
    return replace(every, mode="required")


def offered(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as templates know them."""
    bare: dict[str, Any] = {"parameters": {"type": "object", "properties": {}}}
    functions = [tool.get("function", tool) for tool in tools]
    return [
        {
            "type": "function",
            "function": bare
            | {
                key: value
                for key, value in function.items()
                if value is not None and key not in ("strict", "type")
            },
        }
        for function in functions
    ]


def _tool(tool: Mapping[str, Any], where: str) -> Tool:
    kind = tool.get("type", "function")
    if kind != "function":
        raise UsageError(f"{where}.type: expected 'function', got {kind!r:.80}")
    function = tool.get("function", tool)
    where += ".function" if "function" in tool else ""
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not 0 < len(name) <= 256 or not name.isprintable():
        raise UsageError(f"{where}.name: expected a function's name, got {name!r:.80}")
    if not {*name}.isdisjoint('<>"\\'):
        raise UsageError(f"{where}.name: expected one without quotes or brackets, got {name!r:.80}")
    parameters = function.get("parameters")
    if not isinstance(parameters, Mapping | None):
        raise UsageError(f"{where}.parameters: expected a schema, got {parameters!r:.80}")
    description = function.get("description") or ""
    if not isinstance(description, str):
        raise UsageError(f"{where}.description: expected a text, got {description!r:.80}")
    strict, of = function.get("strict") is True, (parameters or {}).get("type", "object")
    if strict and of != "object":  # arguments are an object, whatever the schema says
        raise UsageError(
            f"{where}.parameters: expected a strict function's of type 'object', got {of!r:.80}"
        )
    return Tool(name, parameters or {}, description, strict=strict)


def _named(every: Choice, choice: Mapping[str, Any]) -> Choice:
    if choice.get("type") == "allowed_tools":
        allowed = _mapping(choice.get("allowed_tools")) or choice
        named: list[object] = [_name(tool) for tool in allowed.get("tools") or ()]
        parallel = every.parallel
        mode: Literal["auto", "required"] = (
            "required" if allowed.get("mode") == "required" else "auto"
        )
    else:
        named, mode, parallel = [_name(choice)], "required", False  # one call, as OpenAI has it
    tools = [tool for tool in every.tools if tool.name in named]
    if len(tools) != len(named) or not named:
        wrong = [name for name in named if name not in [tool.name for tool in tools]]
        raise UsageError(f"tool_choice: expected names of the tools, got {wrong!r:.80}")
    return replace(every, mode=mode, tools=tuple(tools), parallel=parallel)


def _name(choice: object) -> object:
    choice = _mapping(choice)
    return _mapping(choice.get("function")).get("name", choice.get("name"))


def kinds(schema: Any, root: Mapping[str, Any] | None = None, depth: int = 0) -> frozenset[str]:
    """The JSON types that a schema allows, as far as its form tells."""
    if not isinstance(schema, Mapping) or depth > 16:
        return KINDS
    root = schema if root is None else root
    found = KINDS
    if isinstance(ref := schema.get("$ref"), str):
        found &= kinds(_referred(root, ref), root, depth + 1)
    type_ = schema.get("type")
    if type_ is not None:
        named = {t for t in (type_ if isinstance(type_, list) else [type_]) if isinstance(t, str)}
        found &= named | ({"integer"} if "number" in named else set())
    if isinstance(values := schema.get("enum"), list):
        found &= {kind_of(value) for value in values}
    if "const" in schema:
        found &= {kind_of(schema["const"])}
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list):
            found &= frozenset().union(*(kinds(o, root, depth + 1) for o in options))
    if isinstance(parts := schema.get("allOf"), list):
        for part in parts:
            found &= kinds(part, root, depth + 1)
    return found


def kind_of(value: object) -> str:
    """The JSON type of a value."""
    if value is None:
        return "null"
    for kind, name in ((bool, "boolean"), (str, "string"), (int, "integer"), (float, "number")):
        if isinstance(value, kind):
            return name
    return "array" if isinstance(value, list) else "object"


def _referred(root: Mapping[str, Any], ref: str) -> Any:
    found: Any = root
    for key in ref.removeprefix("#").split("/")[1:]:
        found = _mapping(found).get(key.replace("~1", "/").replace("~0", "~"))
    return found


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def dumped(value: object) -> str:
    """JSON as models know it."""
    return json.dumps(value, ensure_ascii=False)
