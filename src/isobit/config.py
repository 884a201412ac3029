"""Configuration: what a model file says, and what the caller chose. Frozen once made."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import numpy as np

from isobit import machine
from isobit.arguments import flag, texts, whole, wholes, wrong
from isobit.errors import FileRefused, ModelRefused, UsageError

MOST_THREADS = 1024
MOST_POSITIONS = 1 << 24
MOST_PAGES = (1 << 31) - 1
MOST_SHARE = 999_999


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a transformer, read from a file's metadata by its architecture."""

    architecture: str
    n_layers: int
    hidden: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn: int
    """Width of one expert's feed-forward, or of the dense one."""
    n_experts: int
    """0 for a dense model."""
    n_experts_used: int
    vocab: int
    rope_base: float
    eps: float
    context_length: int
    normalise_experts: bool

    @property
    def is_moe(self) -> bool:
        """Whether the feed-forward is a mixture of experts."""
        return self.n_experts > 0


class Metadata:
    """A file's metadata with typed look-ups, each refusal naming file, key, expected and got."""

    def __init__(
        self, metadata: Mapping[str, object], source: str, called: Mapping[str, str] | None = None
    ) -> None:
        """``called``: what keys are called where they come from, for refusals."""
        self.metadata = metadata
        self.source = source
        self._called = called or {}

    def refusal(self, key: str, expected: str, got: object) -> ModelRefused:
        """The exception to raise for a key."""
        name = self._called.get(key, key)
        return ModelRefused(f"{self.source}: {name}: expected {expected}, got {_shown(got)}")

    def count(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """An integer within bounds; the same for every layer, where a file lists it by layer."""
        value = self.metadata.get(key, default)
        if isinstance(value, list) and len(value) == self.metadata.get(
            f"{key.partition('.')[0]}.block_count"
        ):
            if any(v != value[0] for v in value):
                raise self.refusal(key, "the same in every layer", value)
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self.refusal(key, f"an integer from {low} to {high}", value)

    def each(
        self, key: str, layers: int, low: int, high: int, default: int | None = None
    ) -> tuple[int, ...]:
        """An integer within bounds for each layer; one stands for all of them."""
        value = self.metadata.get(key, default)
        found = value if isinstance(value, list) else [value] * layers
        if len(found) == layers and all(type(v) is int and low <= v <= high for v in found):
            return tuple(found)
        expected = f"an integer from {low} to {high}, or one for each of {layers} layers"
        raise self.refusal(key, expected, value)

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A number within bounds."""
        value = self.metadata.get(key, default)
        if isinstance(value, float) and low <= value <= high:
            return value
        raise self.refusal(key, f"a number from {low:g} to {high:g}", value)

    def scalar(self, key: str) -> bool | int | float:
        """A flag, an integer from 0 on, or a number, rounded to float32 as GGUF stores it."""
        value = self.metadata.get(key)
        if isinstance(value, bool):
            return value
        if isinstance(value, float):
            return float(np.float32(self.number(key, -3e38, 3e38)))
        return self.count(key, 0, (1 << 31) - 1)

    def text(self, key: str) -> str:
        """A string."""
        value = self.metadata.get(key)
        if isinstance(value, str):
            return value
        raise self.refusal(key, "a string", value)

    def flag(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self.metadata.get(key, default)
        if isinstance(value, bool):
            return value
        raise self.refusal(key, "true or false", value)

    def only(self, key: str, implemented: object) -> None:
        """Refuse any value but the one that is implemented, which a missing key means too."""
        value = self.metadata.get(key, implemented)
        if value != implemented:
            raise self.refusal(key, f"{implemented!r} (nothing else is implemented)", value)


def _shown(value: object) -> str:
    if value is None:
        return "nothing (the key is missing)"
    if isinstance(value, list):  # which can have millions of items
        return f"an array of {len(value)}"
    text = repr(value[:60] if isinstance(value, str) else value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class EngineConfig:
    """What the caller chose; the CLI's defaults are these."""

    activation_bits: int = 16
    """Bits an activation is kept in: 16 (fixed point, two int8 planes) or 8 (one plane, coarse)."""
    threads: int | None = None
    """CPU threads; None means one for each usable core."""
    context: int | None = None
    """Longest sequence in tokens; None means the model's own limit."""
    max_sequences: int = 4
    """Sequences that are run together, and of a recurrent model how many have a state."""
    most_sequences: int | None = None
    """Up to so many instead, if the memory has room for them."""
    pages: int | None = None
    """Pages of 64 positions in the KV cache; None: enough for all sequences of full length."""
    kept_states: int = 32
    """Of a recurrent model, states kept for texts that begin alike, where a backend can."""
    chunk: int = 512
    """Prompt tokens run in one pass."""
    parts: int = 1
    """Processes that the CPU backend is split over, or GPUs that the CUDA backend is."""
    shares: tuple[int, ...] = ()
    """Heads and columns of each of the parts, about in these proportions; none: evenly."""
    expert_shares: tuple[int, ...] = ()
    """Each of the parts has whole experts, in these proportions; none: some columns of each."""
    stages: tuple[str, ...] = ()
    """HOST:PORT of each stage of a pipeline, in order (``isobit stage``); none: no pipeline."""
    stage_key: bytes = field(default=b"", repr=False)
    """What the stages know their caller by."""
    allow_inexact: bool = False
    """Run on a device whose driver fails the self-test; nothing it gives is the specification's."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        found: dict[str, object] = {
            "activation_bits": _bits(self.activation_bits),
            "shares": wholes("shares", self.shares, 1, MOST_SHARE),
            "expert_shares": wholes("expert_shares", self.expert_shares, 1, MOST_SHARE),
            "stages": tuple(texts("stages", self.stages)),
            "allow_inexact": flag("allow_inexact", self.allow_inexact),
        }
        for name, most, optional in (
            ("threads", MOST_THREADS, True),
            ("parts", MOST_THREADS, False),
            ("context", MOST_POSITIONS, True),
            ("pages", MOST_PAGES, True),
            ("max_sequences", MOST_POSITIONS, False),
            ("most_sequences", MOST_POSITIONS, True),
            ("kept_states", MOST_POSITIONS, False),
            ("chunk", MOST_POSITIONS, False),
        ):
            value = getattr(self, name)
            if value is not None or not optional:
                found[name] = whole(name, value, 1, most)
        if not isinstance(self.stage_key, bytes):  # which is a secret: it is not shown
            kind = type(self.stage_key).__name__
            raise UsageError(f"stage_key: expected bytes, got {kind}")
        for name, shares in (("shares", self.shares), ("expert_shares", self.expert_shares)):
            if shares and (n := len(shares)) != self.parts:
                raise UsageError(f"{name}: expected {self.parts}, one for each part, got {n}")
        for name, value in found.items():
            object.__setattr__(self, name, value)

    @property
    def planes(self) -> int:
        """int8 planes that an activation is split into: 2 or 1."""
        return self.activation_bits // 8

    @property
    def activation_planes(self) -> int:
        """What ``planes`` was called before; for a release."""
        return self.planes

    @property
    def cores(self) -> int:
        """CPU threads to use."""
        if self.threads is not None:
            return self.threads
        return machine.cores()


def _bits(value: object) -> int:
    with suppress(UsageError):
        if (bits := whole("activation_bits", value, 8, 16)) in (8, 16):
            return bits
    raise wrong("activation_bits", "8 or 16", value)


def bits_of_planes(planes: object) -> int:
    """``activation_bits`` of what was called ``activation_planes``; UsageError for another value.

    Arguments, options and files said planes, 1 or 2, before. That is accepted for a release.
    """
    return 8 * whole("activation_planes", planes, 1, 2)


def bits_of(bits: int | None, planes: object) -> int:
    """``activation_bits``, said as such, by its former name, or not: UsageError if they differ."""
    if planes is None:
        return EngineConfig.activation_bits if bits is None else bits
    if bits not in (None, meant := bits_of_planes(planes)):
        raise UsageError(
            f"activation_bits: expected {meant}, as activation_planes={planes} means, got "
            f"{bits!r:.20}; say activation_bits alone"
        )
    return meant


def with_planes(data: Mapping[str, Any]) -> dict[str, Any]:
    """What is written, with the former name of ``activation_bits`` beside it."""
    bits = data["activation_bits"]
    return {**data, "activation_planes": None if bits is None else bits // 8}


def without_planes(data: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A file's data, with ``activation_bits`` for ``activation_planes``, its former name.

    Raises FileRefused, naming ``source``, where both are said and differ.
    """
    found = dict(data)
    if "activation_planes" in found:
        planes = found.pop("activation_planes")
        bits = 8 * planes if type(planes) is int else planes
        if (said := found.setdefault("activation_bits", bits)) != bits:
            raise FileRefused(
                f"{source}: activation_bits: expected 8 for each of the activation_planes, got "
                f"{said!r:.20} and {planes!r:.20}"
            )
    return found


def _accept_planes(init: Callable[..., None]) -> Callable[..., None]:
    @wraps(init)
    def accepting(
        self: EngineConfig, *given: Any, activation_planes: object = None, **named: Any
    ) -> None:
        if activation_planes is not None:
            named["activation_bits"] = bits_of(named.get("activation_bits"), activation_planes)
        init(self, *given, **named)

    return accepting


EngineConfig.__init__ = _accept_planes(EngineConfig.__init__)  # type: ignore[method-assign]
