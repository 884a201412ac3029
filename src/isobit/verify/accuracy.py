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
from isobit.verify.diff import ArgmaxChange
from isobit.verify.metrics import kl_divergence, log_softmax, perplexity_of
from isobit.verify.trace import ModelRun, Recordable
from isobit.verify.verify import side_by_side

WINDOW = 512
_CHUNK = 64
_STAGES = frozenset({"moe_router_indices", "lm_head"})


@dataclass
class Accuracy:
    """One model beside the oracle; sums that :func:`measure` adds to."""

    backend: str
    activation_bits: int
    tokens: int = 0
    token_layers: int = 0
    changed_sets: int = 0
    """Token-layers whose set of experts is not the oracle's."""
    first_changed: tuple[int, int] | None = None
    """Layer and position of the first of them."""
    top1_kept: int = 0
    """Tokens after which the most likely next token is the oracle's."""
    kl_sum: float = 0.0
    kl_max: float = 0.0
    """Of KL(oracle || model) of the next-token distributions, in nats."""
    kl_max_at: int = 0
    """The position of the largest."""
    flip: ArgmaxChange | None = None
    """What the last token goes on with here (a) and with the oracle (b), if not with the same."""
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
        """Share of tokens whose most likely successor is the oracle's."""
        return self.top1_kept / self.tokens

    @property
    def perplexity(self) -> float:
        """The model's perplexity of the text."""
        return perplexity_of(self.nll_sum, self.predicted)

    @property
    def oracle_perplexity(self) -> float:
        """The oracle's."""
        return perplexity_of(self.oracle_nll_sum, self.predicted)

    def add_experts(self, expected: Array, got: Array, layer: int, start: int) -> None:
        """Count changed sets of experts [T, k] of a layer; ``start``: the first one's position."""
        changed = (np.sort(expected, axis=1) != np.sort(got, axis=1)).any(axis=1)
        self.token_layers += len(changed)
        self.changed_sets += int(np.count_nonzero(changed))
        if self.first_changed is None and changed.any():
            self.first_changed = layer, start + int(changed.argmax())

    def add_logits(self, expected: Array, got: Array, following: Sequence[int], start: int) -> None:
        """Add a chunk's logits [T, vocabulary]; ``following``: the next tokens, as far as known,
        ``start``: the first one's position."""
        for name, logits in ((self.backend, got), ("the yardstick", expected)):
            if not np.isfinite(logits).all():
                raise GateFailed(f"{name}: expected finite logits, got NaN or infinity")
        kl = kl_divergence(expected, got)
        self.tokens += len(kl)
        self.kl_sum += float(kl.sum())
        if kl.max() > self.kl_max:
            self.kl_max, self.kl_max_at = float(kl.max()), start + int(kl.argmax())
        self.top1_kept += int(np.count_nonzero(expected.argmax(axis=1) == got.argmax(axis=1)))
        a, b = int(got[-1].argmax()), int(expected[-1].argmax())
        of_a, of_b = (float(z[-1, a] - z[-1, b]) for z in (got, expected))
        self.flip = None if a == b else ArgmaxChange(start + len(kl) - 1, a, b, of_a, -of_b)
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
    interrupted: Callable[[list[Accuracy]], None] = lambda _: None,
) -> list[Accuracy]:
    """Run each model beside the oracle, or another yardstick; ``progress(done, total)`` in tokens.

    Where KeyboardInterrupt ends it, ``interrupted`` is given what there is, if there is any.

    Raises NothingCompared for a text of fewer than 2 tokens, GateFailed for logits that are not
    finite. A last window of one token is left out: it predicts nothing.
    """
    ids = list(ids)
    if len(ids) < 2 or window < 2:
        raise NothingCompared(f"text: expected at least 2 tokens, got {min(len(ids), window)}")
    found = [Accuracy(m.backend.name, m.engine.activation_bits) for m in models]
    sources: list[Recordable] = [oracle, *(ModelRun(m) for m in models)]
    total = len(ids) - (len(ids) % window == 1)
    done = 0
    try:
        for start in range(0, total, window):
            part = models[0].checked(ids[start : start + window]) if models else []
            for items in side_by_side(sources, part, _CHUNK, _STAGES):
                stage, layer, positions, expected = items[0]
                first = start + int(positions[0])
                for accuracy, item in zip(found, items[1:], strict=True):
                    if layer is not None:  # the experts
                        accuracy.add_experts(expected, item[3], layer, first)
                    else:
                        following = part[positions[0] + 1 : positions[-1] + 2]
                        accuracy.add_logits(expected, item[3], following, first)
                if stage == "lm_head":
                    done += len(positions)
                    if progress is not None:
                        progress(done, total)
    except KeyboardInterrupt:
        if done:
            interrupted(found)
        raise KeyboardInterrupt(f"after {done:,} of {total:,} tokens") from None
    return found
