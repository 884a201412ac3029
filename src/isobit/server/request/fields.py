"""What clients may ask, as OpenAI's interface has it; unknown fields are ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from isobit.arguments import wholes
from isobit.errors import UsageError
from isobit.runtime.generation import checked_sampling
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampling
from isobit.server.request.prompts import (
    SAMPLING,
    Prompt,
    RequestBody,
    WholeNumber,
    listed,
    of_prompt,
)

MOST_CHOICES = 128
MOST_STOPS = 64

Count = Annotated[
    WholeNumber | None, Field(ge=0), BeforeValidator(lambda n: None if n == -1 else n)
]
"""How many; some clients say -1 for as many as there can be."""

Stop = Annotated[str, Field(max_length=4096)]


class SamplingFields(RequestBody):
    """How tokens are chosen and when they end, under the names that all interfaces share."""

    n: WholeNumber | None = Field(None, ge=1, le=MOST_CHOICES)
    temperature: float | None = None
    top_p: float | None = None
    top_k: WholeNumber | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    json_schema: dict[str, Any] | str | None = None
    regex: str | None = None


class StreamOptions(RequestBody):
    """How a stream ends."""

    include_usage: bool = False


class Common(SamplingFields):
    """What both ways of asking share."""

    model: str | None = None
    max_tokens: Count = None
    seed: WholeNumber | None = None
    prompt_logprobs: None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = None
    isobit_receipt: bool = False
    """Each choice carries the receipt of its tokens."""

    @property
    def sampling(self) -> Sampling:
        """Raises UsageError for what is out of range."""
        top_k = max(self.top_k or 0, 0)  # some clients say -1 for all
        return checked_sampling(
            self.logit_bias,
            temperature=_or(self.temperature, 1.0),
            top_k=top_k,
            top_p=_or(self.top_p, 1.0),
            min_p=_or(self.min_p, 0.0),
            repeat_penalty=_or(self.repetition_penalty, 1.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            seed=self.seed,
        )

    @property
    def stops(self) -> list[str]:
        """The texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def ends(self, model: Model) -> frozenset[int]:
        """The tokens that end an answer. Raises UsageError for those that there are not."""
        own = frozenset() if self.ignore_eos else model.stop_ids
        return own.union(
            wholes("stop_token_ids", self.stop_token_ids or (), 0, model.config.vocab - 1)
        )

    @property
    def usage_at_end(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatRequest(Common):
    """``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Count = None
    logprobs: bool | None = None
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[Any] | None = None
    reasoning_effort: Effort | None = None
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None
    modalities: list[str] | None = None

    @field_validator("continue_final_message", "add_generation_prompt", "modalities")
    @classmethod
    def _answers_in_text(cls, value: Any, field: ValidationInfo) -> Any:
        """What would ask for another answer than a message of text is refused, not ignored."""
        usual = {"add_generation_prompt": True, "modalities": ["text"]}
        if value not in (None, usual.get(str(field.field_name), False)):
            raise ValueError("expected none: an answer is a new message of text")
        return value

    @property
    def words(self) -> Mapping[str, str]:
        """A prompt is made of messages here."""
        words = of_prompt("messages") | SAMPLING | {"chat template": "messages"}
        if self.max_completion_tokens is not None:
            words["max_tokens"] = "max_completion_tokens"
        return words

    @property
    def most(self) -> int | None:
        """The most tokens of an answer; None: to the end of the context."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def measured(self) -> int | None:
        """How many of the most likely tokens are wanted beside each; None: no log-probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise UsageError("top_logprobs: expected logprobs to be true, got false")
        return self.top_logprobs or 0 if self.logprobs else None

    @property
    def variables(self) -> dict[str, Any]:
        """More variables for the template; those that a client names itself count first."""
        found: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            found["reasoning_effort"] = self.reasoning_effort
        if self.enable_thinking is not None or self.reasoning_effort == "none":
            found["enable_thinking"] = bool(self.enable_thinking)
        return found | (self.chat_template_kwargs or {})


class CompletionRequest(Common):
    """``/v1/completions``."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None
    best_of: WholeNumber | None = None

    @property
    def most(self) -> int:
        """The most tokens of an answer; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    def prompts(self) -> list[str | list[int]]:
        """One or more. Raises UsageError for what is not implemented."""
        if self.suffix:
            raise UsageError("suffix: expected none: not implemented")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise UsageError(f"best_of: expected n, which is {self.n or 1}, got {self.best_of}")
        return listed(self.prompt, MOST_CHOICES)

    @property
    def words(self) -> Mapping[str, str]:
        """Those of its prompt."""
        return of_prompt("prompt") | SAMPLING


class TokenizeRequest(RequestBody):
    """``/tokenize``: a text or a conversation."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool = True

    @property
    def words(self) -> Mapping[str, str]:
        """Those of a chat, or of a text."""
        if self.messages is None:
            return of_prompt("prompt")
        return of_prompt("messages") | {"chat template": "messages"}


class DetokenizeRequest(RequestBody):
    """``/detokenize``."""

    tokens: list[int]

    @property
    def words(self) -> Mapping[str, str]:
        """Ids are tokens here."""
        return {"token id": "tokens"}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
