"""From a document to a contract: types, unknown keys, ids. Every finding has a place."""

import difflib
import types
from collections.abc import Iterator
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AliasChoices, ValidationError
from pydantic_core import ErrorDetails

from isobit.contracts.document import MAX_FINDINGS, Document, Key
from isobit.contracts.findings import Severity
from isobit.contracts.kinds import ContractPart
from isobit.contracts.schema import STAGE_STATUSES, STATUSES, TEST_KEYS, VERSION, Contract

_PARTS = ("equations", "proof_obligations", "falsification_tests")
_LAYOUT = (*_PARTS, "implementation_stages", "kani_harnesses", "qa_gate")
"""Any of them, or metadata with a version, make a file a contract."""
NEAR = 0.85
"""How alike an unknown key and a known one are, for the one to be meant as the other."""


def validate(document: Document) -> Contract | None:
    """Add what is wrong to the document's findings; the contract, if its types are right."""
    data = document.data
    if data is None and document.findings:
        return None
    if not isinstance(data, dict):
        document.find("type", f"expected a mapping with metadata, …; got {_typed(data)}")
        return None
    if not _is_contract(data):
        got = ", ".join(map(str, list(data)[:4])) or "nothing"
        message = f"expected a contract (metadata, {', '.join(_PARTS)}), got a file with {got[:60]}"
        document.find("not-a-contract", message, severity="warning" if data else "error")
        return None
    contract = None
    try:
        contract = Contract.model_validate(data)
    except ValidationError as error:
        for detail in error.errors(include_url=False)[: MAX_FINDINGS + 1]:
            _report(document, detail)
    _unknown_keys(document, Contract, data, ())
    _duplicate_ids(document, data)
    _statuses(document, data)
    _emptiness(document, data)
    document.findings.sort(key=lambda f: (f.line, f.column))
    return contract


def _is_contract(data: dict[str, Any]) -> bool:
    """Whether a file is of this layout, or means to be: other files lie beside contracts."""
    metadata = data.get("metadata")
    if isinstance(metadata, dict) and "version" in metadata:
        return True
    first = list(data)[:100]
    return any(
        data.get(key) or difflib.get_close_matches(key, [k for k in first if k != key], 1, NEAR)
        for key in _LAYOUT
    )


def _report(document: Document, detail: ErrorDetails) -> None:
    """One of pydantic's errors in our words."""
    at, value = _descend(document.data, detail["loc"])
    kind, context = detail["type"], detail.get("ctx", {})
    name = _name(at)
    if kind == "missing":
        key = detail["loc"][-1]
        document.find("missing", f"expected the key {key!r}, found none; add it", at)
        return
    if kind == "union_tag_not_found":
        document.find("missing", "expected the key 'kind', found none; add it", at)
        return
    if kind == "union_tag_invalid":
        known = context["expected_tags"].replace("'", "")
        got = f"{name}: expected kind to be one of {known}, got {context['tag']!r}"
        document.find("type", got + _did_you_mean(context["tag"], known.split(", ")), at)
        return
    if kind in ("bound", "figure", "source"):
        document.find("type", f"{name}: {detail['msg']}", at)
        return
    document.find("type", f"{name}: expected {_expected(kind, context)}, got {_typed(value)}", at)


def _expected(kind: str, context: dict[str, Any]) -> str:
    words = {
        "string_type": "text; put it in quotes",
        "int_type": "a whole number",
        "float_type": "a number",
        "bool_type": "true or false",
        "list_type": "a list",
        "dict_type": "a mapping",
        "model_type": "a mapping",
        "model_attributes_type": "a mapping",
        "string_too_short": "some text",
        "too_short": f"at least {context.get('min_length')} entries",
        "too_long": f"at most {context.get('max_length')} entries",
        "greater_than_equal": f"at least {context.get('ge')}",
        "less_than_equal": f"at most {context.get('le')}",
        "less_than": f"less than {context.get('lt')}",
        "literal_error": f"one of {context.get('expected')}",
    }
    if kind == "string_pattern_mismatch" and context.get("pattern") == VERSION:
        return "a version such as 1.0.0"
    if kind in ("string_pattern_mismatch", "date"):
        return "a date such as 2026-05-04"
    return words.get(kind, kind.replace("_", " "))


def _descend(data: Any, loc: tuple[int | str, ...]) -> tuple[Key, Any]:
    """The part of the data that an error's location leads to; names of union members go."""
    at: list[int | str] = []
    for step in loc:
        there = isinstance(data, dict) and step in data
        if there or (isinstance(data, list) and isinstance(step, int) and step < len(data)):
            data = data[step]
            at.append(step)
    return tuple(at), data


def _name(at: Key) -> str:
    """The last key on the way, and the entries of lists below it: "prompts[1]"."""
    words = [i for i, step in enumerate(at) if isinstance(step, str)]
    if not words:
        return "contract"
    return str(at[words[-1]]) + "".join(f"[{step}]" for step in at[words[-1] + 1 :])


def _typed(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"a list of {len(value)}"
    shown = repr(value) if len(str(value)) <= 60 else repr(str(value)[:57] + "…")
    return shown if isinstance(value, str) else f"the {type(value).__name__} {shown}"


@cache
def _fields(part: type[ContractPart]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, f in part.model_fields.items():
        alias = f.validation_alias
        names = alias.choices if isinstance(alias, AliasChoices) else [name]
        out |= dict.fromkeys(map(str, names), f.annotation)
    return out


def _unknown_keys(
    document: Document, part: type[ContractPart], data: dict[str, Any], at: Key
) -> None:
    known = _fields(part)
    for key, value in data.items():
        if key not in known:
            near = _did_you_mean(key, list(known))
            rest = near or "; isobit does not read it"
            document.find_key(
                "unknown-key",
                f"expected a known key, got {key!r}{rest}",
                (*at, key),
                "error" if near else "warning",
            )
            continue
        for inner, there, where in _parts(known[key], value, (*at, key)):
            _unknown_keys(document, inner, there, where)


def _parts(
    annotation: Any, value: Any, at: Key
) -> Iterator[tuple[type[ContractPart], dict[str, Any], Key]]:
    """The mappings within a value that the schema has a class for."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from _parts(args[0], value, at)
    elif origin is list and isinstance(value, list):
        for i, item in enumerate(value):
            yield from _parts(args[0], item, (*at, i))
    elif origin is dict and isinstance(value, dict):
        for key, item in value.items():
            yield from _parts(args[1], item, (*at, key))
    elif origin in (Union, types.UnionType):
        for member in args:
            yield from _parts(member, value, at)
    elif (
        isinstance(annotation, type)
        and issubclass(annotation, ContractPart)
        and isinstance(value, dict)
    ):
        kind = _fields(annotation).get("kind")
        if get_origin(kind) is not Literal or get_args(kind) == (value.get("kind"),):
            yield annotation, value, at


def _did_you_mean(word: object, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word)[:100], known, 1, NEAR)
    return f"; did you mean {near[0]!r}?" if near else ""


def _duplicate_ids(document: Document, data: dict[str, Any]) -> None:
    for section in (
        "proof_obligations",
        "implementation_stages",
        "falsification_tests",
        "kani_harnesses",
    ):
        seen: dict[str, int] = {}
        for i, item in enumerate(_list(data.get(section))):
            name = item.get("id") if isinstance(item, dict) else None
            if not isinstance(name, str):
                continue
            if name in seen:
                line = document.values[section, seen[name], "id"].line
                message = f"expected each id of {section} once, got {name!r} again"
                message += f" (first on line {line})"
                document.find("duplicate-id", message, (section, i, "id"))
            seen.setdefault(name, i)


def _statuses(document: Document, data: dict[str, Any]) -> None:
    stages = _list(data.get("implementation_stages"))
    places: list[tuple[Key, object, tuple[str, ...]]]
    places = [(("status",), data.get("status"), STATUSES)]
    metadata = data.get("metadata")
    if isinstance(metadata, dict):
        places.append((("metadata", "status"), metadata.get("status"), STATUSES))
    for i, stage in enumerate(stages):
        if isinstance(stage, dict):
            at: Key = ("implementation_stages", i, "status")
            places.append((at, stage.get("status"), STAGE_STATUSES))
    for at, status, known in places:
        if isinstance(status, str) and status not in known:
            near = _did_you_mean(status.upper(), list(known))
            listed = near or f"; known are {', '.join(known)}"
            message = f"expected a known status, got {status!r}{listed}"
            document.find("unknown-status", message, at, "warning")


def _emptiness(document: Document, data: dict[str, Any]) -> None:
    if data.get("falsification_tests") in (None, []):
        message = "expected falsification_tests, found none; say what would refute the contract"
        promises = data.get("proof_obligations") or data.get("equations")
        other = _kind(data) is not None and _kind(data) != "kernel" and not promises
        severity: Severity = "warning" if other else "error"
        document.find("empty", message, ("falsification_tests",), severity)
    for i, test in enumerate(_list(data.get("falsification_tests"))):
        if not isinstance(test, dict):
            continue
        place: Key = ("falsification_tests", i, "id")
        name = test.get("id", f"test {i + 1}")
        words = [test.get(key) for key in TEST_KEYS]
        if test.get("measure") is None and all(map(_blank, words)):
            message = (
                f"expected a test or a measure of {name}, found neither; nothing can refute it"
            )
            document.find("empty", message, place)
        if _blank(test.get("if_fails")):
            message = f"expected if_fails of {name}, found none; say what a failure would mean"
            document.find("empty", message, place)
    for key, what in (
        ("proof_obligations", "say what is promised"),
        ("equations", "say what is computed"),
    ):
        if data.get(key) in (None, [], {}):
            document.find("empty", f"expected {key}, found none; {what}", (key,), "warning")
    metadata = data.get("metadata")
    if isinstance(metadata, dict) and metadata.get("references") in (None, []):
        message = "expected references, found none; say what the contract rests on"
        document.find("empty", message, ("metadata", "references"), "warning")


def _kind(data: dict[str, Any]) -> object:
    """What public contracts call their kind: only a ``kernel``, which it is if left out, has to
    make promises; a registry, a pattern, … may be of another layout altogether."""
    metadata = data.get("metadata")
    return metadata.get("kind") if isinstance(metadata, dict) else None


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
