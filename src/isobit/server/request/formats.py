"""What form an answer must have, by whichever field a client asks for it: OpenAI's, vLLM's,
llama.cpp's or SGLang's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from isobit.errors import BackendUnavailable, UsageError
from isobit.server.request.fields import Common
from isobit.server.tool_calls.schemas import AS_TEMPLATES

Kind = Literal["json", "regex", "choice", "grammar"]
_MOST_TEXT = 1 << 16  # characters of what is no JSON


@dataclass(frozen=True)
class Format:
    """A form, and the field that asks for it."""

    field: str
    kind: Kind
    value: Any

    def text(self) -> str:
        """The grammar, as llguidance takes it. Raises UsageError, which names the field."""
        if self.kind == "grammar":
            return self.value if "::=" not in self.value else _from_gbnf(self.value, self.field)
        return f"start: {self.rule()}"

    def rule(self) -> str:
        """The right side of a rule, for a grammar of more than this.

        Raises UsageError for what is a grammar of its own.
        """
        match self.kind:
            case "json":
                options = {**AS_TEMPLATES, "lenient": False}
                schema = {**self.value, "x-guidance": options}  # instead of any that a client gives
                return f"%json {json.dumps(schema, ensure_ascii=False)}"
            case "regex":
                return f"/{_library().regex_to_lark(self.value)}/"
            case "choice":
                return " | ".join(map(json.dumps, self.value))
        raise UsageError(
            f"{self.field}: expected no tools beside a grammar, and a model whose answers are plain"
        )


def asked_format(asked: Common) -> Format | None:
    """The form that a request asks for, if it does. Raises UsageError, which names the field."""
    found = list(_formats(asked))
    if len(found) > 1:
        names = " and ".join(f.field for f in found)
        raise UsageError(f"{found[0].field}: expected one form of the answer, got {names}")
    return _checked(found[0]) if found else None


def _formats(asked: Common) -> Iterator[Format]:
    form = asked.response_format or {}
    kind, field = form.get("type", "text"), "response_format"
    if kind == "json_object":
        yield Format(field, "json", form.get("schema") or {"type": "object"})
    elif kind == "json_schema":
        named = form.get("json_schema", form)
        yield Format(field, "json", named.get("schema") if isinstance(named, Mapping) else named)
    elif kind == "grammar":
        yield Format(field, "grammar", form.get("grammar"))
    elif kind == "regex":
        yield Format(field, "regex", form.get("pattern", form.get("regex")))
    elif kind != "text":
        raise UsageError(
            f"{field}: expected text, json_object, json_schema, regex or grammar, got {kind!r:.60}"
        )
    structured = asked.structured_outputs or {}
    several: dict[str, tuple[Kind, Any]] = {
        "guided_json": ("json", asked.guided_json),
        "guided_regex": ("regex", asked.guided_regex),
        "guided_choice": ("choice", asked.guided_choice),
        "guided_grammar": ("grammar", asked.guided_grammar),
        "json_schema": ("json", asked.json_schema),
        "grammar": ("grammar", asked.grammar),
        "regex": ("regex", asked.regex),
        "structured_outputs.json": ("json", structured.get("json")),
        "structured_outputs.regex": ("regex", structured.get("regex")),
        "structured_outputs.choice": ("choice", structured.get("choice")),
        "structured_outputs.grammar": ("grammar", structured.get("grammar")),
    }
    for name, (kind_, value) in several.items():
        if value not in (None, ""):
            yield Format(name, kind_, value)
    if structured.get("json_object"):
        yield Format("structured_outputs.json_object", "json", {"type": "object"})
    if structured.get("structural_tag"):
        raise UsageError("structured_outputs.structural_tag: expected none: not implemented")


def _checked(found: Format) -> Format:
    field, kind, value = found.field, found.kind, found.value
    if kind == "json":
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UsageError(f"{field}: expected a schema in JSON, got: {error}") from None
        if isinstance(value, bool):
            value = {} if value else {"enum": []}
        if not isinstance(value, Mapping):
            raise UsageError(f"{field}: expected a JSON schema, got {value!r:.60}")
    elif kind == "choice":
        texts = isinstance(value, list) and all(isinstance(v, str) and v for v in value)
        if not texts or not value:
            raise UsageError(f"{field}: expected texts to choose from, got {value!r:.60}")
    elif not isinstance(value, str):
        raise UsageError(f"{field}: expected a text, got {value!r:.60}")
    if isinstance(value, str | list) and sum(map(len, value)) > _MOST_TEXT:
        raise UsageError(f"{field}: expected at most {_MOST_TEXT} characters")
    return Format(field, kind, value)


def _from_gbnf(text: str, field: str) -> str:
    """llama.cpp's form of grammars as Lark."""
    _library()
    from llguidance.gbnf_to_lark import gbnf_to_lark  # noqa: PLC0415 - an extra

    try:
        return gbnf_to_lark(text)
    except Exception as error:  # its errors have no class of their own
        raise UsageError(f"{field}: expected a grammar, got: {error!s:.200}") from None


def _library() -> Any:
    try:
        import llguidance  # noqa: PLC0415 - an extra
    except ImportError:
        raise BackendUnavailable(
            "grammar: llguidance is not installed: pip install '.[serve]'"
        ) from None
    return llguidance
