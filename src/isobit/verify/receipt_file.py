"""Receipts: what a generation was made of, so that anyone with the model can compute it again.

A receipt holds the model's digest, the numerics version, prompt, sampling settings and tokens, and
for each token digests of the logits it was chosen from and of the experts behind them.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from isobit import __version__, arguments, numerics
from isobit.config import with_planes, without_planes
from isobit.errors import FileRefused, IsobitError, UsageError, shown
from isobit.files import regular
from isobit.numerics import SAMPLING_VERSION
from isobit.runtime.grammar import Grammar
from isobit.runtime.sampler import Sampling

FORMAT = "isobit receipt 3"


FORMAT_2 = "isobit receipt 2"  # one SHA-256 of all logits of a token


FORMAT_1 = "isobit receipt 1"  # that, sampling version 1, and fewer settings


_SETTINGS_1 = ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "seed")


LIMIT = 1 << 28  # bytes of a file of receipts


@dataclass(frozen=True)
class TokenRecord:
    """One generated token."""

    token: int
    logits: str
    """Digest (hex) of the logits it was chosen from, float32 little-endian: that of
    ``numerics.digest.tree_digest``; of formats 1 and 2 their SHA-256."""
    experts: list[str]
    """For each layer the first 12 hex digits of the SHA-256 of the expert ids (int32, in rank
    order) of the tokens that were run for it: the prompt for the first, one token for the others.
    Empty for a dense model."""


@dataclass(frozen=True)
class Receipt:
    """A generation's receipt."""

    model: str
    model_sha256: str
    activation_bits: int
    prompt: list[int]
    sampling: dict[str, Any]
    """The fields of ``Sampling``, with the seed in force."""
    tokens: list[TokenRecord]
    backend: str
    device: str
    numerics: int = numerics.VERSION
    sampling_version: int = SAMPLING_VERSION
    isobit: str = __version__
    format: str = FORMAT

    @property
    def settings(self) -> Sampling:
        """``sampling``, as a sampler takes it."""
        return _sampling(self.sampling)

    def to_json(self) -> dict[str, Any]:
        """Its fields, and their former names."""
        return with_planes(asdict(self))

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        file = Path(arguments.path("path", path))
        try:
            file.write_text(json.dumps(self.to_json(), indent=1) + "\n", "utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"{path}: cannot write the receipt: {error}") from None

    @classmethod
    def load(cls, path: str | Path) -> "Receipt":
        """Read and check; raises FileRefused."""
        data = _bytes(path)
        try:
            found = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FileRefused(f"{path}: expected a receipt in JSON, got: {error}") from None
        return cls.of(found, str(path))

    @classmethod
    def load_all(cls, path: str | Path) -> "list[Receipt]":
        """The receipt of a file, or all that what is in it carries: see :func:`receipts_in`."""
        return [receipt for _, receipt in receipts_in(_bytes(path), str(path))]

    @classmethod
    def of(cls, data: Any, source: str) -> "Receipt":
        """Check what JSON holds; raises FileRefused, naming ``source``."""
        if not isinstance(data, dict) or data.get("format") not in (FORMAT, FORMAT_2, FORMAT_1):
            raise FileRefused(f"{source}: expected {FORMAT!r}, got something else")
        if data["format"] == FORMAT_1:
            data = data | {"format": FORMAT_2, "sampling_version": 1}
        data = without_planes(data, source)
        wrong = next((n for n, ok in _checks(data) if not ok), None)
        if wrong is not None:
            value: Any = data
            for name in wrong.split("."):
                value = value.get(name)
            raise FileRefused(f"{source}: {wrong} is missing or malformed, got {shown(value)}")
        if unknown := sorted(data.keys() - {f.name for f in fields(cls)}):
            raise FileRefused(f"{source}: expected the keys of a receipt, got {unknown[0]!r} too")
        return cls(**data | {"tokens": [TokenRecord(**t) for t in data["tokens"]]})


def receipts_in(data: bytes, source: str) -> list[tuple[str, Receipt]]:
    """All receipts in what people have at hand, each with its place.

    data: a receipt; the answer of any interface, or a list of answers; lines of JSON, as
    ``isobit batch`` writes them; or the server-sent events of a stream. Raises FileRefused.
    """
    if len(data) > LIMIT:
        few = "some of its lines at a time: head -n 100 FILE | isobit replay - MODEL"
        raise FileRefused(f"{source}: expected at most {LIMIT >> 20} MiB, got more; give {few}")
    found, n = list[tuple[str, Receipt]](), 0
    for place, document in _documents(data, source):
        n += 1
        name = document.get("custom_id") if isinstance(document, dict) else None
        where = f"{place} ({name})" if isinstance(name, str) else place
        found += [(where, Receipt.of(each, where)) for each in _carried(document)]
    if not found:
        raise FileRefused(
            f"{source}: expected a receipt (run --receipt), or answers that carry one (to requests "
            'with "isobit_receipt": true; in a stream the last piece does), got none in '
            f"{n:,} JSON {'value' if n == 1 else 'values'}"
        )
    return found


def read_receipts(path: str | Path) -> list[tuple[str, Receipt]]:
    """:func:`receipts_in` a file."""
    return receipts_in(_bytes(path), str(path))


def _bytes(path: str | Path) -> bytes:
    place = regular(path, "a receipt")
    try:
        with place.open("rb") as file:
            return file.read(LIMIT + 1)
    except OSError as error:
        raise FileRefused(f"{path}: expected a receipt, got: {error.strerror}") from None


def _documents(data: bytes, source: str) -> Iterator[tuple[str, Any]]:
    """The JSON values of a file, which is one, or has one in a line or in a stream's event."""
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = error
    else:
        yield source, whole
        return
    fresh = True
    for number, line in enumerate(data.splitlines(), 1):
        field, _, rest = line.partition(b":")
        text = (rest if field == b"data" else line).strip()
        if field in (b"", b"event", b"id", b"retry") or text == b"[DONE]":
            fresh = False
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            if fresh:  # it has no lines that are values
                expected = "a receipt or an answer in JSON, lines of JSON, or a stream's events"
                raise FileRefused(f"{source}: expected {expected}, got: {reason}") from None
            raise FileRefused(f"{source}, line {number}: expected JSON, got: {error}") from None
        fresh = False
        yield f"{source}, line {number}", value


def _carried(value: Any) -> Iterator[Any]:
    """The receipts in a JSON value, wherever an interface puts them."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            form = value.get("format")
            if isinstance(form, str) and form.startswith(FORMAT[:-1]):
                yield value
                continue
            receipt = value.get("isobit_receipt")
            if isinstance(receipt, dict):
                yield receipt
                value = {name: part for name, part in value.items() if part is not receipt}
            value = list(value.values())
        if isinstance(value, list):
            left += reversed(value)


def _checks(data: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    for name in ("model", "model_sha256", "backend", "device", "isobit"):
        yield name, isinstance(data.get(name), str)
    yield "numerics", type(data.get("numerics")) is int
    yield "sampling_version", type(data.get("sampling_version")) is int
    bits = data.get("activation_bits")
    yield "activation_bits", type(bits) is int and bits in (8, 16)
    prompt, tokens, sampling = (data.get(n) for n in ("prompt", "tokens", "sampling"))
    yield "prompt", isinstance(prompt, list) and all(type(t) is int for t in prompt)
    yield "tokens", isinstance(tokens, list) and all(map(_is_record, tokens))
    yield "sampling", isinstance(sampling, dict)
    assert isinstance(sampling, dict)  # who is told that it is none asks no more
    for name, ok in _sampling_checks(sampling, data["sampling_version"]):
        yield f"sampling.{name}", ok


def _is_record(t: Any) -> bool:
    return (
        isinstance(t, dict)
        and t.keys() == {"token", "logits", "experts"}
        and type(t["token"]) is int
        and isinstance(t["logits"], str)
        and isinstance(t["experts"], list)
        and all(isinstance(e, str) for e in t["experts"])
    )


def _sampling_checks(data: dict[str, Any], version: object) -> Iterator[tuple[str, bool]]:
    names = set(_SETTINGS_1) if version == 1 else {f.name for f in fields(Sampling)}
    found = data.keys() | ({"grammar"} & names)  # which earlier receipts do not have
    for name in sorted(names ^ found):
        yield name, False
    for name, value in data.items():
        if name == "grammar":
            yield name, _is_grammar(value)
        elif name == "logit_bias":
            yield name, isinstance(value, list) and all(map(_is_bias, value))
        else:
            whole = name in ("seed", "top_k")
            yield name, type(value) is int or (type(value) is float and not whole)
    try:
        _sampling(data)
    except IsobitError as error:
        yield str(error).partition(":")[0].split(" ")[0], False


def _is_bias(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    return type(pair[0]) is int and type(pair[1]) in (int, float)


def _is_grammar(data: Any) -> bool:
    if data is None:
        return True
    if not isinstance(data, dict) or data.keys() != {f.name for f in fields(Grammar)}:
        return False
    texts = all(isinstance(value, str) for name, value in data.items() if name != "thinking")
    return texts and data["thinking"] in (None, True, False)


def _sampling(data: dict[str, Any]) -> Sampling:
    biases = tuple((token, bias) for token, bias in data.get("logit_bias", ()))
    grammar = data.get("grammar") and Grammar(**data["grammar"])
    return Sampling(**data | {"logit_bias": biases, "grammar": grammar})
