"""What an arithmetic costs against the float64 oracle, over a text of any length.

The text is cut into windows, each a sequence of its own; within a window model and oracle run side
by side in small chunks, so that neither the text's length nor the vocabulary sets the memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from isobit.errors import GateFailed, NothingCompared
from isobit.runtime.model import Model
from isobit.verify.arithmetic import Array
from isobit.verify.metrics import kl_divergence, log_softmax
from isobit.verify.trace import ModelRun, Recordable
from isobit.verify.verify import side_by_side

WINDOW = 512
_CHUNK = 64
_STAGES = frozenset({"moe_router_indices", "lm_head"})


@dataclass
class Accuracy:
    """One model beside the oracle; sums that :func:`measure` adds to."""

    backend: str
    activation_planes: int
    tokens: int = 0
    token_layers: int = 0
    changed_sets: int = 0
    """Token-layers whose set of experts is not the oracle's."""
    top1_kept: int = 0
    """Tokens after which the likeliest next token is the oracle's."""
    kl_sum: float = 0.0
    kl_max: float = 0.0
    """Of KL(oracle || model) of the next-token distributions, in nats."""
    predicted: int = 0
    nll_sum: float = 0.0
    oracle_nll_sum: float = 0.0
    """Negative log likelihood of the text's next tokens."""

    @property
    def mean_kl(self) -> float:
        """Mean KL(oracle || model) in nats."""
        return self.kl_sum / self.tokens

    @property
    def changed_fraction(self) -> float | None:
        """Share of token-layers with other experts; None for a dense model."""
        return self.changed_sets / self.token_layers if self.token_layers else None

    @property
    def top1_fraction(self) -> float:
        """Share of tokens whose likeliest successor is the oracle's."""
        return self.top1_kept / self.tokens

    @property
    def perplexity(self) -> float:
        """The model's perplexity of the text."""
        return float(np.exp(self.nll_sum / self.predicted))

    @property
    def oracle_perplexity(self) -> float:
        """The oracle's."""
        return float(np.exp(self.oracle_nll_sum / self.predicted))

    def add_experts(self, expected: Array, got: Array) -> None:
        """Count changed sets of experts [T, k]."""
        changed = (np.sort(expected, axis=1) != np.sort(got, axis=1)).any(axis=1)
        self.token_layers += len(changed)
        self.changed_sets += int(np.count_nonzero(changed))

    def add_logits(self, expected: Array, got: Array, following: Sequence[int]) -> None:
        """Add a chunk's logits [T, vocabulary]; ``following``: the next tokens, as far as known."""
        if not np.isfinite(got).all():
            raise GateFailed(f"{self.backend}: expected finite logits, got NaN or infinity")
        kl = kl_divergence(expected, got)
        self.tokens += len(kl)
        self.kl_sum += float(kl.sum())
        self.kl_max = max(self.kl_max, float(kl.max()))
        self.top1_kept += int(np.count_nonzero(expected.argmax(axis=1) == got.argmax(axis=1)))
        rows = np.arange(len(following))
        self.predicted += len(following)
        self.nll_sum -= float(log_softmax(got)[rows, following].sum())
        self.oracle_nll_sum -= float(log_softmax(expected)[rows, following].sum())


def measure(
    models: Sequence[Model],
    oracle: Recordable,
    ids: Sequence[int],
    window: int = WINDOW,
    progress: Callable[[int, int], None] | None = None,
) -> list[Accuracy]:
    """Run each model beside the oracle, or another yardstick; ``progress(done, total)`` in tokens.

    Raises NothingCompared for a text of fewer than 2 tokens, GateFailed for logits that are not
    finite. A last window of one token is left out: it predicts nothing.
    """
    ids = list(ids)
    if len(ids) < 2 or window < 2:
        raise NothingCompared(f"text: expected at least 2 tokens, got {min(len(ids), window)}")
    found = [Accuracy(m.backend.name, m.engine.activation_planes) for m in models]
    sources: list[Recordable] = [oracle, *(ModelRun(m) for m in models)]
    total = len(ids) - (len(ids) % window == 1)
    done = 0
    for start in range(0, total, window):
        part = models[0].checked(ids[start : start + window]) if models else []
        for items in side_by_side(sources, part, _CHUNK, _STAGES):
            stage, _, positions, expected = items[0]
            for accuracy, item in zip(found, items[1:], strict=True):
                if stage == "moe_router_indices":
                    accuracy.add_experts(expected, item[3])
                else:
                    following = part[positions[0] + 1 : positions[-1] + 2]
                    accuracy.add_logits(expected, item[3], following)
            if stage == "lm_head":
                done += len(positions)
                if progress is not None:
                    progress(done, total)
    return found
