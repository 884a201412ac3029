"""Configuration: what a model file says, and what the caller chose. Frozen once made."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isobit.errors import ModelRefused, UsageError

ARCHITECTURES = ("qwen3moe", "qwen3")
MOST_THREADS = 1024
MOST_POSITIONS = 1 << 24

_KNOWN_ROPE_KEYS = frozenset(
    {
        *("freq_base", "dimension_count", "scale_linear"),
        *("scaling.type", "scaling.factor", "scaling.attn_factor"),
        *("scaling.original_context_length", "scaling.finetuned"),  # say nothing by themselves
    }
)
_NOT_IMPLEMENTED = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias"),
    *("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping"),
    *("logit_scale", "residual_scale", "embedding_scale", "expert_group_count"),
)
"""Keys of other architectures that would make another computation of the graph."""


@dataclass(frozen=True)
class ModelConfig:
    """Hyper-parameters of a Qwen3 or Qwen3-MoE model, all read from the file's metadata."""

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

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, object], *, vocab: int, source: str
    ) -> "ModelConfig":
        """Read and check the hyper-parameters; ``vocab`` is the token embedding's row count.

        Raises ModelRefused naming the key for anything missing, malformed or not implemented.
        """
        r = _Reader(metadata, source)
        arch = architecture(metadata, source)
        moe = arch == "qwen3moe"
        heads = r.count(f"{arch}.attention.head_count", 1, 4096)
        hidden = r.count(f"{arch}.embedding_length", 1, 1 << 20)
        head_dim = r.count(f"{arch}.attention.key_length", 2, 512, default=hidden // heads)
        config = cls(
            architecture=arch,
            n_layers=r.count(f"{arch}.block_count", 1, 4096),
            hidden=hidden,
            n_heads=heads,
            n_kv_heads=r.count(f"{arch}.attention.head_count_kv", 1, heads, default=heads),
            head_dim=head_dim,
            ffn=r.count(f"{arch}.{'expert_' if moe else ''}feed_forward_length", 1, 1 << 20),
            n_experts=r.count(f"{arch}.expert_count", 1, 4096) if moe else 0,
            n_experts_used=r.count(f"{arch}.expert_used_count", 1, 64) if moe else 0,
            vocab=vocab,
            rope_base=r.number(f"{arch}.rope.freq_base", 1.0, 1e12),
            eps=r.number(f"{arch}.attention.layer_norm_rms_epsilon", 1e-30, 1.0),
            context_length=r.count(f"{arch}.context_length", 1, MOST_POSITIONS),
            normalise_experts=r.flag(f"{arch}.expert_weights_norm", default=True),
        )
        config._check(r, arch)
        return config

    def _check(self, r: "_Reader", arch: str) -> None:
        if self.n_heads % self.n_kv_heads:
            raise r.refusal(
                f"{arch}.attention.head_count_kv", f"a divisor of {self.n_heads}", self.n_kv_heads
            )
        if self.head_dim % 2:
            raise r.refusal(f"{arch}.attention.key_length", "an even number", self.head_dim)
        if self.is_moe and self.n_experts_used > self.n_experts:
            raise r.refusal(
                f"{arch}.expert_used_count", f"at most {self.n_experts}", self.n_experts_used
            )
        r.only(f"{arch}.attention.value_length", self.head_dim)
        r.only(f"{arch}.rope.dimension_count", self.head_dim)
        r.only(f"{arch}.vocab_size", self.vocab)
        r.only(f"{arch}.rope.scaling.type", "none")
        r.only(f"{arch}.rope.scaling.factor", 1.0)
        r.only(f"{arch}.rope.scaling.attn_factor", 1.0)
        r.only(f"{arch}.rope.scale_linear", 1.0)
        rope = f"{arch}.rope."
        for key, value in r.metadata.items():
            if key.startswith(rope) and key.removeprefix(rope) not in _KNOWN_ROPE_KEYS:
                raise r.refusal(key, "no such key (it is not implemented)", value)
        for name in _NOT_IMPLEMENTED:
            if (key := f"{arch}.{name}") in r.metadata:
                raise r.refusal(key, "no such key (it is not implemented)", r.metadata[key])
        tokens = r.metadata.get("tokenizer.ggml.tokens")
        if isinstance(tokens, Sequence) and len(tokens) != self.vocab:
            expected = f"{self.vocab} tokens, as many as token_embd.weight has rows"
            raise r.refusal("tokenizer.ggml.tokens", expected, len(tokens))
        r.only(f"{arch}.attention.causal", True)
        r.only(f"{arch}.attention.sliding_window", 0)
        r.only(f"{arch}.expert_weights_scale", 1.0)
        r.only(f"{arch}.expert_shared_count", 0)
        r.only(f"{arch}.expert_gating_func", 1)  # softmax
        r.only(f"{arch}.leading_dense_block_count", 0)


def architecture(metadata: Mapping[str, object], source: str) -> str:
    """The architecture of a model; raises ModelRefused for one that is not implemented.

    Asked first: what such a model lacks besides would only be called missing.
    """
    r = _Reader(metadata, source)
    arch = r.text("general.architecture")
    if arch not in ARCHITECTURES:
        raise r.refusal("general.architecture", f"one of {', '.join(ARCHITECTURES)}", arch)
    return arch


class _Reader:
    """Typed look-ups in metadata, each refusal naming file, key, expected and got."""

    def __init__(self, metadata: Mapping[str, object], source: str) -> None:
        self.metadata = metadata
        self.source = source

    def refusal(self, key: str, expected: str, got: object) -> ModelRefused:
        return ModelRefused(f"{self.source}: {key}: expected {expected}, got {_shown(got)}")

    def count(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and low <= value <= high:
            return value
        raise self.refusal(key, f"an integer from {low} to {high}", value)

    def number(self, key: str, low: float, high: float) -> float:
        value = self.metadata.get(key)
        if isinstance(value, float) and low <= value <= high:
            return value
        raise self.refusal(key, f"a number from {low:g} to {high:g}", value)

    def text(self, key: str) -> str:
        value = self.metadata.get(key)
        if isinstance(value, str):
            return value
        raise self.refusal(key, "a string", value)

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if isinstance(value, bool):
            return value
        raise self.refusal(key, "true or false", value)

    def only(self, key: str, implemented: object) -> None:
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

    activation_planes: int = 2
    """Signed bytes an activation is kept in: 2 (16-bit fixed point) or 1 (int8, coarse)."""
    threads: int | None = None
    """CPU threads; None means one for each usable core."""
    context: int | None = None
    """Longest sequence in tokens; None means the model's own limit."""
    max_sequences: int = 4
    """Sequences of full length the KV cache holds at once."""
    chunk: int = 512
    """Prompt tokens run in one pass."""
    allow_inexact: bool = False
    """Run on a device whose driver fails the self-test; nothing it gives is the specification's."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if type(self.activation_planes) is not int or self.activation_planes not in (1, 2):
            raise UsageError(f"activation_planes: expected 1 or 2, got {self.activation_planes!r}")
        for name in ("threads", "context", "max_sequences", "chunk"):
            value = getattr(self, name)
            most = MOST_THREADS if name == "threads" else MOST_POSITIONS
            if value is None and name in ("threads", "context"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise UsageError(f"{name}: expected an integer from 1 to {most}, got {value!r:.60}")

    @property
    def cores(self) -> int:
        """CPU threads to use."""
        if self.threads is not None:
            return self.threads
        if hasattr(os, "sched_getaffinity"):
            return len(os.sched_getaffinity(0))
        return os.cpu_count() or 1
