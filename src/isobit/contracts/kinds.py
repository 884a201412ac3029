"""What a falsification test can measure: the figures each kind yields, and the bounds on them.

Types only; ``measure.py`` and its like compute the figures.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from isobit.backend_names import BackendName

Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Prompt = Annotated[list[Token], Field(min_length=1, max_length=1 << 16)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
LongPrompt = Annotated[list[Token], Field(min_length=2, max_length=1 << 16)]


class ContractPart(BaseModel):
    """A mapping of a contract. Keys that it does not know are reported apart from its types."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True, defer_build=True)


@dataclass(frozen=True)
class Figure:
    """A number that a measure yields, and the range it can lie in."""

    what: str
    low: float
    high: float


_COUNT = (0.0, math.inf)
_FRACTION = (0.0, 1.0)
FIGURES: dict[str, dict[str, Figure]] = {
    "parity": {
        "differing_values": Figure("values whose bits differ, over all stages and layers", *_COUNT),
        "layers_below_cosine_0_99": Figure(
            "layers whose output has a cosine below 0.99 to the other backend's", *_COUNT
        ),
        "least_layer_cosine": Figure("the least cosine of a layer's output", -1.0, 1.0),
    },
    "router_sets": {
        "changed_sets": Figure("token-layers whose set of experts differs", *_COUNT),
        "changed_orders": Figure("token-layers with the same experts in another order", *_COUNT),
    },
    "argmax": {
        "changed_prompts": Figure("prompts after which the most likely token differs", *_COUNT),
        "changed_positions": Figure("positions after which the most likely token differs", *_COUNT),
    },
    "invariant": {
        "router_weight_deviation": Figure(
            "largest distance of a token-layer's sum of router weights from 1", *_FRACTION
        ),
        "nonfinite_values": Figure("values that are NaN or infinite, over all stages", *_COUNT),
    },
    "determinism": {
        "differing_values": Figure("logits whose bits differ between two runs", *_COUNT),
    },
    "kv_equivalence": {
        "differing_values": Figure(
            "logits of cached decoding that are not those of running the whole text again", *_COUNT
        ),
    },
    "fault_injection": {
        "missed_faults": Figure("planted faults that the comparison did not report", *_COUNT),
        "misplaced_faults": Figure("planted faults reported at another stage or layer", *_COUNT),
    },
    "accuracy": {
        "mean_kl": Figure("mean KL(yardstick || backend) of the next token, nats", *_COUNT),
        "changed_sets": Figure("share of token-layers with other experts", *_FRACTION),
        "top1_kept": Figure("share of positions with the same most likely token", *_FRACTION),
        "perplexity_change": Figure("perplexity over the yardstick's, minus 1", -1.0, math.inf),
    },
    "throughput": {
        "median_tokens_per_second": Figure("decoded tokens a second, median of runs", *_COUNT),
        "ratio_to_peer": Figure("median over llama-bench's on the same file and device", *_COUNT),
    },
    "memory": {
        "used_fraction": Figure("memory in use with the model loaded, of all there is", *_FRACTION),
        "used_gb": Figure("memory in use with the model loaded, in 10^9 bytes", *_COUNT),
    },
}
"""The figures of each kind of measure."""

SPEED = ("throughput", "memory")
"""Kinds that say nothing unless the results are right; they run last."""


class Bound(ContractPart):
    """What a figure may be; at least one side."""

    at_most: Finite | None = Field(None, description="The largest value that passes.")
    at_least: Finite | None = Field(None, description="The smallest value that passes.")

    @model_validator(mode="after")
    def _one_side(self) -> "Bound":
        if self.at_most is None and self.at_least is None:
            raise PydanticCustomError("bound", "expected at_most, at_least or both, got neither")
        return self

    def holds(self, value: float) -> bool:
        """Whether a figure passes; NaN never does."""
        low = -math.inf if self.at_least is None else self.at_least
        return low <= value <= (math.inf if self.at_most is None else self.at_most)

    def __str__(self) -> str:
        parts = []
        if self.at_least is not None:
            parts.append(f"≥ {self.at_least:g}")
        if self.at_most is not None:
            parts.append(f"≤ {self.at_most:g}")
        return " and ".join(parts)


def never_fails(bound: Bound, figure: Figure) -> bool:
    """Whether every value that a figure can have lies within a bound."""
    above = bound.at_least is None or bound.at_least <= figure.low
    below = bound.at_most is None or bound.at_most >= min(figure.high, 1e300)
    return above and below


class ModelNeeds(ContractPart):
    """Which models a measure speaks of."""

    sample: bool = Field(False, description="The sample model that ships with isobit, alone.")
    vocabulary: int | None = Field(None, description="Number of tokens in the vocabulary.")
    layers: int | None = Field(None, description="Number of layers.")
    hidden: int | None = Field(None, description="Width of the residual stream.")
    experts: int | None = Field(None, description="Number of experts; 0: a dense model.")
    file_gb: Bound | None = Field(None, description="The size of its files, in 10^9 bytes.")

    @property
    def named(self) -> bool:
        """Whether it asks for anything."""
        sizes = (self.vocabulary, self.layers, self.hidden, self.experts, self.file_gb)
        return self.sample or any(n is not None for n in sizes)


class DeviceNeeds(ContractPart):
    """Which devices a measure speaks of."""

    name: str | None = Field(
        None, min_length=1, description="A part of the device's name, such as H100."
    )
    memory_gb: Bound | None = Field(None, description="The device's memory, in 10^9 bytes.")

    @property
    def named(self) -> bool:
        """Whether it asks for anything."""
        return self.name is not None or self.memory_gb is not None


class _Measure(ContractPart):
    backends: list[BackendName] = Field(
        min_length=1, description="The backends whose promise this measures."
    )
    model: ModelNeeds | None = Field(
        None, description="The models it is meant for; others leave it not run."
    )
    device: DeviceNeeds | None = Field(
        None, description="The devices it is meant for; others leave it not run."
    )
    activation_bits: Literal[8, 16] | None = Field(
        None,
        description="Bits of an activation, on both sides: 16 (two planes; so if left out) or 8 "
        "(one).",
    )
    threshold: dict[str, Bound] = Field(
        min_length=1, description="Bounds on the figures that this kind of measure yields."
    )

    @property
    def bits(self) -> int:
        """Bits of an activation."""
        return self.activation_bits or 16

    @model_validator(mode="after")
    def _figures(self) -> "_Measure":
        kind: str = self.kind  # type: ignore[attr-defined]
        for name in self.threshold:
            if name not in FIGURES[kind]:
                known = ", ".join(FIGURES[kind])
                raise PydanticCustomError(
                    "figure", f"threshold: expected figures of {kind} ({known}), got {name!r}"
                )
        return self


class Parity(_Measure):
    """Every stage of every layer, bit for bit, against another backend."""

    kind: Literal["parity"]
    against: BackendName = Field("reference", description="The backend compared with.")
    prompts: list[Prompt] = Field(min_length=1, description="Token ids; one token will do.")


class RouterSets(_Measure):
    """The experts chosen at every layer, against another backend."""

    kind: Literal["router_sets"]
    against: BackendName = Field("reference", description="The backend compared with.")
    prompts: list[Prompt] = Field(min_length=1, description="Token ids; one token will do.")


class Argmax(_Measure):
    """The most likely next token, against another backend."""

    kind: Literal["argmax"]
    against: BackendName = Field("reference", description="The backend compared with.")
    prompts: list[Prompt] = Field(min_length=1, description="Token ids; one token will do.")


class Invariant(_Measure):
    """What holds of one backend's values by themselves."""

    kind: Literal["invariant"]
    prompts: list[Prompt] = Field(min_length=1, description="Token ids.")


class Determinism(_Measure):
    """The same tokens again, and cut into other chunks."""

    kind: Literal["determinism"]
    prompts: list[LongPrompt] = Field(min_length=1, description="Token ids, at least two each.")
    repeats: Annotated[int, Field(ge=2, le=100)] = Field(
        3, description="Runs in one piece that must agree."
    )
    chunks: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=lambda: [1, 3],
        description="Sizes of pieces to run the prompt in; each must agree with one piece.",
    )


class KvEquivalence(_Measure):
    """Tokens decoded one by one from the cache, against running the whole text again."""

    kind: Literal["kv_equivalence"]
    prompts: list[Prompt] = Field(min_length=1, description="Token ids.")
    tokens: Annotated[int, Field(ge=1, le=4096)] = Field(
        8, description="Tokens decoded after each prompt."
    )


class FaultInjection(_Measure):
    """The backend against a reference with a planted fault: the comparison must notice each."""

    kind: Literal["fault_injection"]
    prompts: list[Prompt] = Field(min_length=1, description="Token ids; one token will do.")
    faults: list[str] = Field(
        min_length=1, description='Names from isobit.verify.faults, or "all" alone.'
    )


class Accuracy(_Measure):
    """How far from a yardstick that rounds no activations, over a text."""

    kind: Literal["accuracy"]
    against: Literal["oracle", "hf"] = Field(
        "oracle", description="oracle: float64; hf: transformers in float32."
    )
    text: str | None = Field(None, description="A UTF-8 file in the repository.")
    prompts: list[LongPrompt] | None = Field(None, description="Token ids instead of a text.")
    tokens: Annotated[int, Field(ge=2)] = Field(512, description="Tokens of the text to use.")

    @model_validator(mode="after")
    def _one_source(self) -> "Accuracy":
        if (self.text is None) == (self.prompts is None):
            raise PydanticCustomError("source", "expected either text or prompts")
        return self


class Throughput(_Measure):
    """Decoding speed at batch 1, counted only in a run whose results were right."""

    kind: Literal["throughput"]
    tokens: Annotated[int, Field(ge=16, le=65536)] = Field(
        128, description="Tokens decoded in each run."
    )
    depth: Annotated[int, Field(ge=0, le=1 << 20)] = Field(
        0, description="Tokens in the cache before."
    )
    repeats: Annotated[int, Field(ge=1, le=100)] = Field(5, description="Runs, after a warm-up.")


class Memory(_Measure):
    """Memory in use with the model loaded for a context."""

    kind: Literal["memory"]
    context: Annotated[int, Field(ge=1, le=1 << 20)] = Field(
        4096, description="Tokens the KV cache has room for."
    )


Measure = Annotated[
    Parity
    | RouterSets
    | Argmax
    | Invariant
    | Determinism
    | KvEquivalence
    | FaultInjection
    | Accuracy
    | Throughput
    | Memory,
    Field(discriminator="kind"),
]
"""Any of them, told apart by ``kind``."""
