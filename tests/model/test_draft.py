"""The draft block of Qwen3.5-MoE: its graph against a program of its own in float64, bit for bit on
the backends, and how often it guesses the token that the model takes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import isobit
from isobit.arrays import F32
from isobit.backends.base import Backend, Batch
from isobit.config import EngineConfig
from isobit.errors import ModelRefused
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.passes import opened, same_bits
from tests.model.test_qwen35 import _tensors

DATA = Path(__file__).parents[1] / "data"
SAMPLE = DATA / "pyhybrid-moe-34m-Q4_K_M.gguf"
N = 300
F64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def file() -> Iterator[GGUFFile]:
    with GGUFFile.open(SAMPLE) as found:
        yield found


@pytest.fixture(scope="module")
def ids() -> list[int]:
    text = (DATA / "pyhybrid-heldout.txt").read_text()
    with isobit.load(SAMPLE, backend="cpu") as model:
        return model.tokenize(text)[: N + 1]


@pytest.fixture(scope="module")
def trunk(file: GGUFFile, ids: list[int]) -> tuple[F32, F32]:
    """The model's logits and its last normed rows."""
    backend = opened("cpu", Weights.from_file(file), EngineConfig(context=512, max_sequences=1))
    rows: list[F32] = []
    batch = _batch(ids[:N], 0)
    logits = backend.forward(
        batch, lambda _s, _l, v: rows.append(np.array(v)), frozenset({"final_norm"})
    )
    backend.close()
    return logits, rows[0]


def _batch(ids: list[int], first: int, received: F32 | None = None) -> Batch:
    n = len(ids)
    return Batch(
        np.array(ids, np.int32),
        np.arange(first, first + n, dtype=np.int32),
        np.zeros(n, np.int32),
        np.arange(8, dtype=np.int32)[None],
        np.arange(n, dtype=np.int32),
        received=received,
    )


def _drafts(backend: Backend, ids: list[int], hidden: F32, cuts: list[int]) -> F32:
    """What the block makes of each position's token after it."""
    n = len(hidden)
    return np.concatenate(
        [
            backend.forward(_batch(ids[a + 1 : b + 1], a, np.ascontiguousarray(hidden[a:b])))
            for a, b in zip(cuts, [*cuts[1:], n], strict=True)
        ]
    )


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_bits(
    file: GGUFFile, ids: list[int], trunk: tuple[F32, F32], planes: int, name: str
) -> None:
    weights, hidden = Weights.draft_from_file(file), trunk[1][:90]
    engine = EngineConfig(activation_bits=8 * planes, context=512, max_sequences=1, threads=2)
    expected = _drafts(opened("reference", weights, engine), ids, hidden, [0])
    backend = opened(name, weights, engine)
    for cuts in ([0], [0, 1, 2, 31, 64, 65]):
        assert same_bits(_drafts(backend, ids, hidden, cuts), expected), cuts
    backend.close()


def test_a_program_of_its_own_in_float64(
    file: GGUFFile, ids: list[int], trunk: tuple[F32, F32]
) -> None:
    n = 100
    expected = _float64(ids[1 : n + 1], trunk[1][:n].astype(np.float64))
    engine = EngineConfig(context=512, max_sequences=1)
    backend = opened("cpu", Weights.draft_from_file(file), engine)
    found = _drafts(backend, ids, trunk[1][:n], [0])
    backend.close()
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    print(f"error: median {np.median(errors):.2e}, largest {errors.max():.2e}")
    assert np.median(errors) < 2e-3


def test_guesses_are_as_good_as_they_were_when_it_was_trained(
    file: GGUFFile, ids: list[int], trunk: tuple[F32, F32]
) -> None:
    """llama.cpp and PyTorch: 56 to 57 % of 100,000 positions of held-out text."""
    logits, hidden = trunk
    backend = opened("cpu", Weights.draft_from_file(file), EngineConfig(context=512))
    guessed = _drafts(backend, ids, hidden, [0])[:-1].argmax(1)
    backend.close()
    agreed = np.mean(guessed == logits[1:].argmax(1))
    print(f"{agreed:.1%} of {N - 1} guesses")
    assert 0.45 < agreed < 0.75


def test_a_file_without_the_block_is_refused(file: GGUFFile) -> None:
    metadata = dict(file.metadata)
    key = "qwen35moe.nextn_predict_layers"
    file.metadata[key] = 0  # type: ignore[index]
    with pytest.raises(ModelRefused, match=f"{key}: expected 1 or more, got none"):
        Weights.draft_from_file(file)
    file.metadata[key] = metadata[key]  # type: ignore[index]
    for name in [n for n in file.tensors if n.startswith("blk.8.") and "shared_head" not in n]:
        tensor = file.tensors.pop(name)  # type: ignore[attr-defined]
        with pytest.raises(ModelRefused, match=name):
            Weights.draft_from_file(file)
        file.tensors[name] = tensor  # type: ignore[index]
    with (
        GGUFFile.open(isobit.runtime.model.sample_path()) as plain,
        pytest.raises(ModelRefused, match="draft block: expected one, qwen3moe has none"),
    ):
        Weights.draft_from_file(plain)


def _float64(ids: list[int], hidden: F64) -> F64:
    """The block written out, of the gguf package's numbers."""
    w = {k.removeprefix("blk.8."): v for k, v in _tensors(SAMPLE).items()}
    H, G, D, half, base, eps = 4, 2, 256, 32, 1e7, 1e-6

    def rms(x: F64, weight: F64) -> F64:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight

    def sigmoid(x: F64) -> F64:
        return 1 / (1 + np.exp(-x))

    def swiglu(x: F64, gate: F64, up: F64, down: F64) -> F64:
        g = x @ gate.T
        return (g * sigmoid(g) * (x @ up.T)) @ down.T

    def turned(x: F64) -> F64:
        angle = np.arange(len(x))[:, None, None] * base ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half : 2 * half]
        c, s = np.cos(angle), np.sin(angle)
        return np.concatenate([a * c - b * s, b * c + a * s, x[..., 2 * half :]], axis=-1)

    e = rms(w["token_embd.weight"][ids], w["nextn.enorm.weight"])
    both = np.concatenate([e, rms(hidden, w["nextn.hnorm.weight"])], axis=1)
    x = both @ w["nextn.eh_proj.weight"].T
    h, n = rms(x, w["attn_norm.weight"]), len(ids)
    q_and_gate = (h @ w["attn_q.weight"].T).reshape(n, H, 2 * D)
    q = turned(rms(q_and_gate[..., :D], w["attn_q_norm.weight"]))
    k = turned(rms((h @ w["attn_k.weight"].T).reshape(n, G, D), w["attn_k_norm.weight"]))
    v = (h @ w["attn_v.weight"].T).reshape(n, G, D)
    out = np.empty((n, H, D))
    for i in range(H):
        s = q[:, i] @ k[:, i // (H // G)].T / np.sqrt(D)
        s = np.where(np.tri(n, dtype=bool), s, -np.inf)
        p = np.exp(s - s.max(1, keepdims=True))
        out[:, i] = p / p.sum(1, keepdims=True) @ v[:, i // (H // G)]
    gated = out * sigmoid(q_and_gate[..., D:])
    x = x + gated.reshape(n, -1) @ w["attn_output.weight"].T
    h = rms(x, w["post_attention_norm.weight"])
    z = h @ w["ffn_gate_inp.weight"].T
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    y = np.zeros_like(x)
    for t in range(n):
        chosen = np.argsort(-p[t], kind="stable")[:4]
        for expert in chosen:
            weight = p[t, expert] / p[t, chosen].sum()
            of = (w[f"ffn_{role}_exps.weight"][expert] for role in ("gate", "up", "down"))
            y[t] += weight * swiglu(h[t], *of)
    shared = swiglu(h, *(w[f"ffn_{role}_shexp.weight"] for role in ("gate", "up", "down")))
    x = x + y + sigmoid(h @ w["ffn_gate_inp_shexp.weight"].reshape(-1))[:, None] * shared
    norm = w.get("nextn.shared_head_norm.weight", w["output_norm.weight"])
    return rms(x, norm) @ w.get("nextn.shared_head_head.weight", w["output.weight"]).T
