"""A loaded model, and load(): the library's front door."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

from isobit.arguments import instance, whole, wrong
from isobit.config import MOST_PAGES, MOST_POSITIONS, EngineConfig, bits_of
from isobit.errors import did_you_mean
from isobit.numerics import KV_PAGE
from isobit.runtime.engine import Engine
from isobit.runtime.generation import (
    Completion,
    Settings,
    Stream,
    checked_sampling,
)
from isobit.runtime.loaded import locate, sample_path
from isobit.runtime.scheduler import QueueFull
from isobit.runtime.scoring import ScoringModel, is_batch
from isobit.runtime.tokens import Watcher
from isobit.text.prompt import conversation_prompt
from isobit.text.template import ChatPrompt

__all__ = ["Model", "load", "locate", "sample_path"]


class ChatVariables(TypedDict, total=False):
    """What a template is given beside messages; see ``Model.chat``."""

    tools: Sequence[Mapping[str, object]] | None
    documents: Sequence[Mapping[str, object]] | None
    chat_template_kwargs: Mapping[str, object] | None
    most: int | None


def _known(method: str, given: Mapping[str, object], known: type) -> None:
    """Raises TypeError as Python does, in the name of the method that was called and not of the
    one that it hands its keywords to."""
    for name in given:
        if name not in known.__annotations__:
            near = did_you_mean(name, known.__annotations__)
            raise TypeError(f"Model.{method}() got an unexpected keyword argument {name!r}{near}")


class Model(ScoringModel):
    """A model on a backend. A context manager; its methods may be called from several threads.

    What any method raises is an ``isobit.errors.IsobitError``: besides what it says itself,
    UsageError for arguments of another kind and once the model is closed, ModelRefused if the
    logits are not finite (damaged weights), and for text if the file has no tokenizer.
    """

    def __init__(
        self,
        path: str | Path,
        backend: str,
        engine: EngineConfig,
        note: Callable[[str], None] | None = None,
    ) -> None:
        """See :func:`load`."""
        super().__init__(path, backend, engine, note)
        self.generations = Engine(self)

    def close(self) -> None:
        """Free the backend and unmap the file, after the pass that another thread may be in."""
        self.generations.close()
        super().close()

    def __repr__(self) -> str:
        c, e = self.config, self.engine
        return (
            f"<isobit.Model {str(self.path)!r}: {c.architecture} on {self.backend.name} "
            f"({self.backend.device}), context {self.context}, "
            f"activation_bits {e.activation_bits}{', closed' if self._closed else ''}>"
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        routes: bool = False,
        salt: str | None = "",
        stop: str | Sequence[str] | None = None,
        watch: Watcher | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Stream:
        """Continue a prompt (text, or token ids); yields text, then holds ``.completion``.

        Args:
            prompt: text, in which special tokens are recognised, or token ids.
            max_tokens: the most to generate; None goes on to the end of the context.
            temperature, top_k, top_p, min_p, repeat_penalty, presence_penalty,
                frequency_penalty, logit_bias, seed: see ``isobit.Sampling``.
            logprobs: k adds to the completion the log-probabilities of its tokens and, at each
                place, of the k most likely.
            routes: adds the experts of its tokens.
            salt: keys and values of a beginning that another prompt had, too, are used again among
                those of the same salt; None: with none.
            stop: the text ends before any of these; one that is the text of a special token is
                that token.
            watch: sees the passes and the choices, e.g. an ``isobit.Recorder``.
            progress: ``progress(done, total)`` is called: how many tokens of the prompt were run.

        Raises:
            UsageError: the prompt is empty, longer than the context, or no text or token ids;
                a setting is of the wrong type or out of range.
        """
        sampling = checked_sampling(
            logit_bias,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            seed=seed,
        )
        sampling.check_ids(self.config.vocab)
        return Stream(
            self,
            self.checked(self._ids(prompt)),
            max_tokens=max_tokens,
            sampling=sampling,
            stop=stop,
            watch=watch,
            progress=progress,
            logprobs=logprobs,
            routes=routes,
            salt=salt,
        )

    @overload
    def generate(self, prompt: str | Sequence[int], **settings: Unpack[Settings]) -> Completion: ...
    @overload
    def generate(
        self, prompt: list[str] | list[list[int]], **settings: Unpack[Settings]
    ) -> list[Completion]: ...
    def generate(
        self,
        prompt: str | Sequence[int] | list[str] | list[list[int]],
        **settings: Unpack[Settings],
    ) -> Completion | list[Completion]:
        """Continue a prompt and return it all at once; takes what :meth:`stream` takes.

        A list of prompts gives a list of completions: they run together, and each is what its
        prompt alone would give. All prompts are checked before the first is run. Waits while
        generations of other threads hold the KV cache. Raises what :meth:`stream` does.
        """
        _known("generate", settings, Settings)
        if not is_batch(prompt):
            return self.stream(prompt, **settings).complete()  # type: ignore[arg-type]
        streams = [self.stream(p, **settings) for p in prompt]
        try:
            with suppress(QueueFull):  # the rest is lined up when it is read
                for stream in streams:
                    stream.begin(wait=False)
            return [stream.complete() for stream in streams]
        finally:
            for stream in streams:
                stream.close()

    def chat_ids(
        self, messages: Sequence[Mapping[str, object]], **variables: Unpack[ChatVariables]
    ) -> list[int]:
        """Token ids of a conversation in the model's chat template, ready for the answer.

        Arguments and errors are those of :meth:`chat`.
        """
        _known("chat_ids", variables, ChatVariables)
        variables.setdefault("most", self.context)
        return self.chat_prompt(messages, **variables).ids

    def chat_prompt(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        most: int | None = None,
    ) -> ChatPrompt:
        """The ids of :meth:`chat_ids`, and the text that the template wrote.

        Raises UsageError for more than ``most`` ids, too.
        """
        if most is not None:
            whole("most", most, 0, 2**63 - 1, also=" or None")
        own: Mapping[str, Any] = {} if chat_template_kwargs is None else chat_template_kwargs
        instance("chat_template_kwargs", own, Mapping, "variables of the template")
        taken = ("messages", "tools", "documents", "most", "tokenizer")
        for name in own:
            if not isinstance(name, str) or name in taken:
                raise wrong("chat_template_kwargs", "variables of the template", name)
        return conversation_prompt(
            self.tokenizer,
            messages,
            tools=tools,
            documents=documents,
            most=most,
            **own,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        documents: Sequence[Mapping[str, object]] | None = None,
        chat_template_kwargs: Mapping[str, object] | None = None,
        **settings: Unpack[Settings],
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: ``[{"role": "user", "content": …}, …]``, as OpenAI's interface has them.
            tools, documents: what the model may call and cite, as its template expects them;
                functions are told in words to one whose template knows none.
            chat_template_kwargs: more variables for the template: ``{"enable_thinking": False}``.
            settings: those of :meth:`stream`.

        Raises:
            UsageError: a message is malformed or the template refuses it, which is named; and
                what :meth:`stream` raises.
            ModelRefused: the template is damaged or hostile.
        """
        _known("chat", settings, Settings)
        ids = self.chat_ids(
            messages, tools=tools, documents=documents, chat_template_kwargs=chat_template_kwargs
        )
        return self.generate(ids, **settings)


def load(
    path_or_sample: str | Path = "sample",
    backend: str = "auto",
    *,
    activation_bits: int | None = None,
    threads: int | None = None,
    context: int | None = None,
    sequences: int = EngineConfig.max_sequences,
    chunk: int = EngineConfig.chunk,
    cache: int | None = None,
    parts: int = 1,
    shares: Sequence[int] = (),
    expert_shares: Sequence[int] = (),
    stages: Sequence[str] = (),
    stage_key: bytes = b"",
    activation_planes: int | None = None,
) -> Model:
    """Load a GGUF model (``"sample"`` is the one that ships with isobit) on a backend.

    Args:
        path_or_sample: a path, ``hf://ORG/REPO[:QUANT]`` (downloaded if the cache has none),
            ``ollama://NAME``, or ``"sample"``; a file of that name is ``"./sample"``.
        backend: auto (cuda, else wgpu on a GPU, else cpu), reference, cpu, cuda or wgpu.
        activation_bits: 16 keeps activations in 16-bit fixed point, 8 in int8; None: 16.
        threads: of the CPU; None: all.
        context: longest sequence in tokens; None: the model's, or what there is room for.
        sequences: how many are run together.
        chunk: prompt tokens in a pass.
        cache: tokens of all sequences together that the KV cache has room for; None: enough for
            sequences of full length, or what there is room for.
        parts: processes that the cpu backend, or GPUs that the cuda backend, is split over.
        shares: the parts have heads and columns about in these proportions; none: evenly.
        expert_shares: each part has whole experts, in these proportions, instead of some columns of
            each expert.
        stages: HOST:PORT of each stage of a pipeline, in order (``isobit stage``), which runs the
            layers instead of a backend here.
        stage_key: what the stages know their caller by.
        activation_planes: what activation_bits was before, 2 (16 bits) or 1 (8); for a release.

    Warns if the file is larger than the memory, if the KV cache is smaller than was asked, and if
    ``auto`` takes another backend than the GPU that there is; says why.

    Raises:
        ModelRefused: the file is damaged, hostile, or asks for what is not implemented.
        UsageError: an argument is of the wrong type or out of range.
        BackendUnavailable: the backend cannot run here, or has too little memory.
    """
    engine = EngineConfig(
        activation_bits=bits_of(activation_bits, activation_planes),
        threads=threads,
        context=context,
        max_sequences=whole("sequences", sequences, 1, MOST_POSITIONS),
        chunk=chunk,
        pages=_pages(cache),
        parts=parts,
        shares=shares,  # type: ignore[arg-type]  # it makes tuples of these
        expert_shares=expert_shares,  # type: ignore[arg-type]
        stages=stages,  # type: ignore[arg-type]
        stage_key=stage_key,
    )
    return Model(path_or_sample, backend, engine)


def _pages(cache: int | None) -> int | None:
    if cache is None:
        return None
    return -(-whole("cache", cache, 1, MOST_PAGES * KV_PAGE) // KV_PAGE)
