"""A receipt made beside a generation, and computed again: equal digests on another backend mean
equal bits."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isobit import numerics
from isobit.arguments import instance, whole
from isobit.backends.base import CHOSEN, F32, I32, Routes
from isobit.errors import FileRefused, NothingCompared, UsageError
from isobit.numerics import SAMPLING_VERSION
from isobit.numerics.digest import tree_digest
from isobit.runtime.model import Model
from isobit.runtime.sampler import Sampler, Sampling
from isobit.runtime.sampler_v1 import SamplerV1
from isobit.verify.receipt_file import FORMAT_2, TokenRecord
from isobit.verify.receipt_file import Receipt as Receipt  # noqa: PLC0414 - as above
from isobit.verify.trace_file import save_tensors

_SAMPLERS = {1: SamplerV1, SAMPLING_VERSION: Sampler}
_ROWS_AT_ONCE = 64  # logits held while replaying


class Recorder:
    """Watches one generation: ``model.generate(prompt, watch=recorder)``; then ``receipt()``."""

    stages = frozenset({CHOSEN})

    def __init__(self) -> None:
        self._model: Model | None = None
        self._tokens: list[tuple[int, bytes, list[Routes]]] = []
        self._new: list[Routes] = []

    def begin(self, model: Model, prompt: list[int], sampling: Sampling, seed: int) -> None:
        """The generation starts."""
        if self._model is not None:
            raise UsageError("a recorder watches one generation: make another")
        self._model, self._prompt = model, list(prompt)
        biases = [list(pair) for pair in sampling.logit_bias]
        self._sampling = asdict(sampling) | {"seed": seed, "logit_bias": biases}

    def tap(self, _stage: str, _layer: int | None, _value: NDArray[np.generic]) -> None:
        """No stage is asked for."""

    def routed(self, experts: Routes) -> None:
        """Keep the experts of a pass."""
        self._new.append(experts)

    def chose(self, digest: bytes, token: int) -> None:
        """Seal a token."""
        self._tokens.append((token, digest, self._new))  # at once: another thread may be reading
        self._new = []

    def receipt(self, n: int | None = None) -> Receipt:
        """The receipt of the first ``n`` tokens, or of what was generated so far.

        The generation may go on in another thread.
        """
        if n is not None:
            whole("n", n, 0)
        if self._model is None:
            raise UsageError("nothing was generated: no receipt")
        m = self._model
        m.check_file()  # the last pass was of the model that is named here
        sealed = self._tokens[:n]
        experts = self._experts(m, [routes for *_, routes in sealed])
        return Receipt(
            model=m.path.name,
            model_sha256=m.file.sha256(),
            activation_bits=m.engine.activation_bits,
            prompt=self._prompt,
            sampling=self._sampling,
            tokens=[
                TokenRecord(token, digest.hex(), of)
                for (token, digest, _), of in zip(sealed, experts, strict=True)
            ],
            backend=m.backend.name,
            device=m.backend.device,
        )

    def _experts(self, model: Model, routes: Sequence[Sequence[Routes]]) -> list[list[str]]:
        """For each token's routes its record's ``experts``."""
        made = [_by_layer(parts) for parts in routes]
        first, rest = made[:1], made[1:]
        if len({rows.shape for rows in rest}) != 1 or not rest[0].size:
            return [list(map(_short, rows)) for rows in made]
        short = model.rows.digests(np.concatenate(rest))[:, :6]  # a token's ids: their SHA-256
        text, n = short.tobytes().hex(), 12 * len(rest[0])
        each = (text[i : i + n] for i in range(0, len(text), n))
        found = [[layers[i : i + 12] for i in range(0, n, 12)] for layers in each]
        return [*(list(map(_short, rows)) for rows in first), *found]

    def routes(self) -> tuple[I32, I32]:
        """The tokens that were run, int32 [T], and their experts, int32 [T, layers, k].

        The last token generated was not run. Raises UsageError for a dense model.
        """
        sealed = list(self._tokens)
        found = [part for *_, parts in sealed for part in parts]
        if not found:
            raise UsageError("routes: expected a mixture of experts that ran, got none")
        experts = np.concatenate(found)
        ids = self._prompt + [token for token, *_ in sealed]
        return np.array(ids[: len(experts)], np.int32), experts.astype(np.int32)

    def experts_of(self, index: int) -> list[list[int]]:
        """The experts behind generated token ``index``, by layer: those of the position before it.

        Empty for a dense model.
        """
        n = len(self._tokens)
        *_, parts = self._tokens[whole("index", index, -n, n - 1)]
        chosen: list[list[int]] = parts[-1][-1].tolist() if parts else []
        return chosen

    def save_routes(self, path: str | Path) -> None:
        """Write :meth:`routes` as safetensors: ``tokens`` and ``experts``."""
        tokens, experts = self.routes()
        save_tensors(path, "the routes", {"tokens": tokens, "experts": experts})


def _digest(logits: F32, receipt: Receipt) -> str:
    data = np.ascontiguousarray(logits, "<f4").tobytes()
    whole = hashlib.sha256(data).digest() if receipt.format == FORMAT_2 else tree_digest(data)
    return whole.hex()


def _by_layer(parts: Sequence[Routes]) -> I32:
    """Experts, parts of [n, layers, k], as rows of a layer each, int32 [layers, n * k]."""
    if not parts:
        return np.empty((0, 0), np.int32)
    by_layer = np.concatenate(parts).swapaxes(0, 1)
    return np.ascontiguousarray(by_layer, "<i4").reshape(len(by_layer), -1)


def _short(experts: I32) -> str:
    return hashlib.sha256(np.ascontiguousarray(experts, "<i4").tobytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Difference:
    """The first thing of a receipt that came out otherwise."""

    index: int
    """Which generated token, from 0."""
    stage: str
    """moe_router_indices, lm_head, or "sampling": equal logits gave another token."""
    layer: int | None

    def __str__(self) -> str:
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"generated token {self.index}: {self.stage}{layer}"


@dataclass
class _Seen:
    """What a replay's passes gave, by position."""

    logits: dict[int, F32] = field(default_factory=dict)
    experts: dict[int, list[I32]] = field(default_factory=dict)
    start: int = 0

    def tap(self, _stage: str, _layer: int | None, value: NDArray[np.generic]) -> None:
        """Take a layer's experts of the tokens from position ``start`` on."""
        for i, row in enumerate(np.array(value, np.int32)):
            self.experts.setdefault(self.start + i, []).append(row)

    def experts_of(self, first: int, stop: int) -> list[I32]:
        """For each layer the experts of positions first … stop-1."""
        rows = [self.experts[p] for p in range(first, stop) if p in self.experts]
        return [np.stack([r[i] for r in rows]) for i in range(len(rows[0]))] if rows else []


def replay(receipt: Receipt, model: Model) -> Difference | None:
    """Compute a receipt again on a model; None if every digest and token is the same.

    Prompt and tokens run in chunks, which gives the same bits as one by one. Raises FileRefused if
    the receipt is of another model or arithmetic, NothingCompared if it holds no token.
    """
    instance("receipt", receipt, Receipt, "a Receipt")
    instance("model", model, Model, "a model")
    _check_same(receipt, model)
    tokens = [t.token for t in receipt.tokens]
    sampling = receipt.settings
    try:
        prompt = model.checked(receipt.prompt)
        ids = model.checked(prompt + tokens[:-1])
        sampling.check_ids(model.config.vocab)
    except UsageError as error:
        raise FileRefused(f"receipt: {error}") from None
    sampler = _sampler(receipt, sampling, prompt, model)
    seen, done, start = _Seen(), 0, 0
    with model.new_sequence() as sequence:
        while start < len(ids):
            room = model.engine.chunk if start < len(prompt) else _ROWS_AT_ONCE
            stop = min(start + room, len(ids), len(prompt) if start < len(prompt) else len(ids))
            rows = [i for i in range(start, stop) if i >= len(prompt) - 1]
            seen.start = start
            wanted = [i - start for i in rows]
            logits = model.forward(sequence, ids[start:stop], wanted, seen.tap, Recorder.stages)
            seen.logits |= dict(zip(rows, logits, strict=True))
            start = stop
            while done < len(tokens) and len(prompt) - 1 + done in seen.logits:
                found = _first(receipt, done, seen, sampler, model)
                if found is not None:
                    return found
                sampler.append(tokens[done])
                done += 1
    return None


def _sampler(
    receipt: Receipt, sampling: Sampling, prompt: list[int], model: Model
) -> Sampler | SamplerV1:
    if sampling.grammar is None:
        found: Sampler | SamplerV1 = _SAMPLERS[receipt.sampling_version](sampling, prompt)
        return found
    try:
        constraint = model.grammars.constraint(sampling.grammar)
    except UsageError as error:
        raise FileRefused(f"receipt: grammar: {error}") from None
    return Sampler(sampling, prompt, constraint=constraint)


def _check_same(receipt: Receipt, model: Model) -> None:
    if not receipt.tokens:
        raise NothingCompared("receipt: expected at least one generated token, got none")
    for what, said, got in (
        ("model sha256", receipt.model_sha256, model.file.sha256()),
        ("numerics version", receipt.numerics, numerics.VERSION),
        ("activation bits", receipt.activation_bits, model.engine.activation_bits),
    ):
        if said != got:
            raise FileRefused(f"receipt: {what}: expected {said}, as it says; here it is {got}")
    if receipt.sampling_version not in _SAMPLERS:
        known = " or ".join(map(str, _SAMPLERS))
        raise FileRefused(
            f"receipt: sampling version: expected {known}, got {receipt.sampling_version}"
        )


def _first(
    receipt: Receipt, index: int, seen: _Seen, sampler: Sampler | SamplerV1, model: Model
) -> Difference | None:
    """The first difference in one generated token."""
    said, at = receipt.tokens[index], len(receipt.prompt) - 1 + index
    got = list(map(_short, seen.experts_of(0 if index == 0 else at, at + 1)))
    for layer in range(max(len(got), len(said.experts))):
        if got[layer : layer + 1] != said.experts[layer : layer + 1]:
            return Difference(index, "moe_router_indices", layer)
    logits = seen.logits.pop(at)
    if _digest(logits, receipt) != said.logits:
        return Difference(index, "lm_head", None)
    try:
        chosen = sampler.choose(logits, model.rows)
    except UsageError:  # its grammar allows nothing here
        chosen = -1
    if chosen != said.token:
        return Difference(index, "sampling", None)
    return None
