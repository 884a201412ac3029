"""How far the arithmetic moves a model from the float64 oracle over the same weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from isobit.gguf.reader import GGUFFile
from isobit.text.tokenizer import Tokenizer
from tests.helpers import passes
from tests.model.oracle import OracleRun

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "src/isobit/data/pycoder-moe-33m-Q4_K_M.gguf"
TEXT = ROOT / "tests/data/heldout.txt"


@dataclass(frozen=True)
class Accuracy:
    """One run beside the oracle's."""

    tokens: int
    mean_kl: float
    """Mean over positions of KL(oracle || run) of the next-token distributions, in nats."""
    changed_sets: float
    """Fraction of token-layers whose set of experts is not the oracle's."""
    top1_kept: float
    """Fraction of positions whose most likely token is the oracle's."""
    perplexity: float
    oracle_perplexity: float

    @property
    def perplexity_change(self) -> float:
        return self.perplexity / self.oracle_perplexity - 1

    @classmethod
    def of(
        cls, oracle: OracleRun, logits: NDArray[np.floating], experts: NDArray[np.integer]
    ) -> "Accuracy":
        """logits [T, vocabulary]; experts [L, T, k] in any order."""
        expected, found = log_softmax(oracle.logits), log_softmax(logits)
        return cls(
            tokens=len(oracle.ids),
            mean_kl=float((np.exp(expected) * (expected - found)).sum(axis=1).mean()),
            changed_sets=float(changed(oracle.experts, experts).mean()) if experts.size else 0.0,
            top1_kept=float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
            perplexity=_perplexity(found, oracle.ids),
            oracle_perplexity=_perplexity(expected, oracle.ids),
        )

    @classmethod
    def mean(cls, parts: Sequence["Accuracy"]) -> "Accuracy":
        """Of sequences equally long; perplexities as those of all their tokens."""
        n = len(parts)
        return cls(
            tokens=sum(p.tokens for p in parts),
            mean_kl=sum(p.mean_kl for p in parts) / n,
            changed_sets=sum(p.changed_sets for p in parts) / n,
            top1_kept=sum(p.top1_kept for p in parts) / n,
            perplexity=exp(sum(log(p.perplexity) for p in parts) / n),
            oracle_perplexity=exp(sum(log(p.oracle_perplexity) for p in parts) / n),
        )


def log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    x = logits.astype(np.float64)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def changed(a: NDArray[np.integer], b: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[L, T]: where two runs chose different sets of experts."""
    return (np.sort(a, axis=2) != np.sort(b, axis=2)).any(axis=2)


def _perplexity(log_p: NDArray[np.float64], ids: NDArray[np.int64]) -> float:
    return float(np.exp(-log_p[np.arange(len(ids) - 1), ids[1:]].mean()))


def tokens_of(text: Path) -> list[int]:
    """A text in the sample model's tokens."""
    with GGUFFile.open(SAMPLE) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata, str(SAMPLE))
    return tokenizer.encode(text.read_text("utf-8"), special=False)


def measure(path: Path, oracle: OracleRun, backend: str, planes: int) -> Accuracy:
    """The engine's run over the oracle's tokens, in one sequence."""
    experts = passes.Experts()
    with passes.backend_of(path, backend, planes) as b:
        ids = oracle.ids.tolist()
        logits = passes.run(b, ids, chunk=512, tap=experts, stages=passes.Experts.STAGES)
    return Accuracy.of(oracle, logits, experts.ids)
