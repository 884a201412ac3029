"""Whole passes of the CPU backend against the reference: every stage, bit for bit."""

import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import Batch, Wanted
from isobit.backends.base.batch import field_values
from isobit.backends.cpu import CpuBackend, simd_levels
from isobit.backends.reference import ReferenceBackend
from isobit.cli import main
from isobit.config import EngineConfig, ModelConfig
from isobit.errors import BackendUnavailable
from isobit.gguf import formats
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import qwen3
from isobit.model.stages import ON_REQUEST, all_stages
from isobit.model.weights import Weights
from isobit.numerics import Weight
from isobit.runtime.model import load, sample_path
from tests.helpers.blocks import set_d, set_dmin


@pytest.fixture(scope="module")
def sample():
    with GGUFFile.open(sample_path()) as file:
        yield Weights.from_file(file)


def tensor(rng, fmt, *shape):
    """Random weights of about unit gain, built from the format's own bytes."""
    n = int(np.prod(shape))
    if not fmt.quantized:
        data = (rng.standard_normal(n) / np.sqrt(shape[-1])).astype(np.float32)
        if fmt is formats.F16:
            data = data.astype(np.float16)
        elif fmt is formats.BF16:
            data = (data.view(np.uint32) >> 16).astype(np.uint16)
        return Weight(f"{rng.random()}", fmt, shape, data.view(np.uint8))
    blocks = rng.integers(0, 256, (n // fmt.block_size, fmt.block_bytes), dtype=np.uint8)
    u = fmt.unpack(blocks)
    spread = np.std(u.codes.astype(float)) * np.sqrt(np.mean(u.scales.astype(float) ** 2))
    d = 1 / (spread * np.sqrt(shape[-1]))
    set_d(fmt.name, blocks, d)
    if u.mins is not None:
        sign = -1 if fmt.block_size == 32 else 1
        offset = sign * u.codes.mean() * u.scales.mean() / u.mins.mean() * d
        set_dmin(fmt.name, blocks, offset)
    return Weight(f"{rng.random()}", fmt, shape, blocks.reshape(-1))


def model(rng, kinds, *, experts=0, used=0, head_dim=64, tied=False, normalise=True):
    """A two-layer model whose matrices take their formats from ``kinds`` in turn."""
    by_name = {f.name: f for f in formats.FORMATS.values()}
    turn = [by_name[name] for name in kinds.split()]
    count = iter(range(1000))

    class Made:
        """A file's tensors, made up as they are asked for."""

        source = "made up"

        def __contains__(self, name):
            return name == "output.weight" and not tied

        def split(self, name, parts):
            pass

        def leave_out(self, name):
            pass

        def take(self, name, *shape):
            if len(shape) == 1:
                values = (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32)
                return Weight(name, formats.F32, shape, values.view(np.uint8))
            router = "ffn_gate_inp" in name
            fmt = formats.F32 if router else turn[next(count) % len(turn)]
            return replace(tensor(rng, fmt, *shape), name=name)

    c = ModelConfig(
        architecture="qwen3moe" if experts else "qwen3",
        n_layers=2,
        hidden=256,
        n_heads=8,
        n_kv_heads=2,
        head_dim=head_dim,
        ffn=512,
        n_experts=experts,
        n_experts_used=used,
        vocab=300,
        rope_base=1e4,
        eps=1e-6,
        context_length=512,
        normalise_experts=normalise,
    )
    return Weights(c, qwen3.graph(c, Made()))


def batch_of(rng, vocab, parts, pages, rows=None):
    """Tokens of several sequences, from (first position, tokens) of each."""
    counts = [n for _, n in parts]
    total = sum(counts)
    return Batch(
        tokens=rng.integers(0, vocab, total).astype(np.int32),
        positions=np.concatenate([np.arange(p, p + n) for p, n in parts]).astype(np.int32),
        sequence=np.repeat(np.arange(len(parts)), counts).astype(np.int32),
        pages=np.ascontiguousarray(pages),
        logit_rows=np.arange(total, dtype=np.int32) if rows is None else np.array(rows, np.int32),
    )


def traced(backend, batch, stages=None):
    found = {}

    def tap(stage, layer, value):
        assert (stage, layer) not in found
        found[stage, layer] = np.array(value)

    return backend.forward(batch, tap, stages), found


def same_pass(ours, batch, expected, moe):
    """Hold a backend's pass to ``expected``, what ``traced`` gives of the reference."""
    want_logits, want = expected
    assert np.isfinite(want_logits).all()
    logits, got = traced(ours, batch)
    assert list(got) == list(want)
    assert {stage for stage, _ in got} == set(all_stages(moe=moe)) - ON_REQUEST
    for key, value in want.items():
        assert got[key].shape == value.shape, key
        assert got[key].dtype == value.dtype, key
        assert got[key].tobytes() == value.tobytes(), key
    assert logits.tobytes() == want_logits.tobytes()
    assert ours.forward(batch).tobytes() == want_logits.tobytes()  # untraced


RAGGED = np.array([[5, 0, 3], [1, 7, 2], [4, 6, 8]], np.int32)
KINDS = {
    "moe": ("Q4_K Q4_K Q6_K Q5_K", {"experts": 16, "used": 4}),
    "moe-small-heads": ("Q3_K Q2_K Q6_K", {"experts": 5, "used": 2, "head_dim": 32}),
    "moe-unnormalised": ("Q8_0 F16 Q4_K", {"experts": 8, "used": 8, "normalise": False}),
    "dense": ("Q4_0 Q5_1 Q8_0 BF16 Q5_0", {"head_dim": 128}),
    "moe-tables": ("IQ4_XS IQ4_NL MXFP4", {"experts": 4, "used": 2}),
    "dense-tied": ("Q6_K F32 Q4_1", {"tied": True}),
}


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_other_shapes(kind, planes, rng):
    formats_in_turn, shape = KINDS[kind]
    weights = model(rng, formats_in_turn, **shape)
    engine = EngineConfig(activation_bits=8 * planes, threads=2, context=192, max_sequences=3)
    passes = [[(0, 66), (0, 1), (0, 5)], [(66, 1), (1, 3), (5, 1)], [(67, 1)]]
    batches = [batch_of(rng, weights.config.vocab, parts, RAGGED) for parts in passes]
    reference = ReferenceBackend(weights, engine)
    expected = [traced(reference, batch) for batch in batches]
    for simd in simd_levels():
        ours = CpuBackend(weights, engine, simd=simd)
        for batch, want in zip(batches, expected, strict=True):
            same_pass(ours, batch, want, weights.config.is_moe)
        ours.close()


def test_sample_stages(sample, rng):
    engine = EngineConfig(context=128)
    batch = batch_of(rng, sample.config.vocab, [(0, 66), (0, 5)], RAGGED[:2, :2], rows=[65, 70])
    expected = traced(ReferenceBackend(sample, engine), batch)
    same_pass(CpuBackend(sample, engine), batch, expected, moe=True)


def test_only_wanted_stages_and_rows(sample, rng):
    engine = EngineConfig(context=128)
    batch = batch_of(rng, sample.config.vocab, [(0, 5)], np.array([[0]], np.int32), rows=[])
    logits, found = traced(CpuBackend(sample, engine), batch, frozenset({"moe_router"}))
    assert logits.shape == (0, sample.config.vocab)
    assert list(found) == [("moe_router", i) for i in range(sample.config.n_layers)]


def test_an_error_of_the_tap_comes_out(sample, rng):
    def tap(stage, layer, value):
        raise KeyError(stage)

    batch = batch_of(rng, sample.config.vocab, [(0, 5)], np.array([[0]], np.int32))
    backend = CpuBackend(sample, EngineConfig(context=128))
    with pytest.raises(KeyError, match="embedding"):
        backend.forward(batch, tap)
    assert np.isfinite(backend.forward(batch)).all()


@pytest.mark.parametrize("tap", [None, lambda *_: None])
def test_a_signal_ends_a_long_pass(sample, rng, tap):
    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    class Engine:
        def forward(self, *arguments):
            self.logits = arguments[7]
            self.logits.fill(7)
            signal.setitimer(signal.ITIMER_REAL, 0.005)
            engine.forward(*arguments)

    n = 2048
    backend = CpuBackend(sample, EngineConfig(context=n, max_sequences=1))
    tokens = rng.integers(0, sample.config.vocab, n).astype(np.int32)
    at, pages = np.arange(n, dtype=np.int32), np.arange(n // 64, dtype=np.int32)[None]
    work = Batch(tokens, at, 0 * at, pages, at[-1:])
    expected = backend.forward(work)
    engine, backend._engine = backend._engine, Engine()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(Interrupted):
            backend.forward(work, tap, frozenset({"attn_norm"}))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert (backend._engine.logits == 7).all(), "the pass ran to its end"
    backend._engine = engine  # which can be used again
    assert np.array_equal(backend.forward(work).view(np.uint32), expected.view(np.uint32))


def test_levels_and_memory_that_are_not_there(sample):
    with pytest.raises(BackendUnavailable, match=r"expected one of .*portable.*, got mmx"):
        CpuBackend(sample, EngineConfig(), simd="mmx")
    with pytest.raises(BackendUnavailable, match=r"a context of .* has room"):
        CpuBackend(sample, EngineConfig(context=1 << 24, max_sequences=1 << 16))


def test_a_file_larger_than_memory_runs_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr("isobit.runtime.loaded.total_memory", lambda: 2e7)
    with pytest.warns(UserWarning, match="20 MB of weights in 20 MB of memory"):
        load("sample", backend="cpu", context=64).close()
    assert main(["run", "--backend", "cpu", "--tokens", "1", "-n", "1", "-c", "64"]) == 0
    assert "the system will page" in capsys.readouterr().err
    monkeypatch.setattr("isobit.runtime.loaded.total_memory", lambda: 2.1e7)
    assert main(["run", "--backend", "cpu", "--tokens", "1", "-n", "1", "-c", "64"]) == 0
    assert "page" not in capsys.readouterr().err


HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"


@pytest.mark.parametrize("path", [sample_path(), HYBRID], ids=["sample", "states"])
def test_lanes_change_no_bit(path, rng):
    """Steps and prompts of many sequences, each thread's apart from the others': all that a pass
    may give, and what the next finds in the cache, is what one thread gives."""
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        vocab = weights.config.vocab
        alone, three = (
            CpuBackend(weights, EngineConfig(context=256, max_sequences=64, threads=n))
            for n in (1, 3)
        )
        three._engine.fence()
        pages = rng.permutation(64 * 4).astype(np.int32).reshape(64, 4)
        ends = np.zeros(64, np.int64)
        some = np.sort(rng.choice(40, 7, replace=False)).astype(np.int32)
        for kind, logits in (("prompts", True), ("steps", False), ("both", some)):
            most = {"prompts": 9, "steps": 1, "both": 6}[kind]
            which = np.sort(rng.choice(64, 50, replace=False)) if kind == "both" else np.arange(64)
            lengths = rng.integers(1, most + 1, len(which))
            lasts = np.cumsum(lengths) - 1
            batch = Batch(
                rng.integers(0, vocab, lengths.sum()).astype(np.int32),
                np.concatenate(
                    [np.arange(e, e + n) for e, n in zip(ends[which], lengths, strict=True)]
                ).astype(np.int32),
                np.repeat(np.arange(len(which), dtype=np.int32), lengths),
                np.ascontiguousarray(pages[which]),
                np.sort(rng.choice(lasts, 40, replace=False)).astype(np.int32),
                which.astype(np.int32),
            )
            ends[which] += lengths
            given = rng.integers(0, vocab, (40, 2)).astype(np.int32)
            wanted = Wanted(logits, argmax=True, top=3, given=given, digests=True, hidden=True)
            wanted = replace(wanted, routes=True)
            one, other = (field_values(b.run(batch, wanted)) for b in (alone, three))
            for name, value in one.items():
                assert np.array_equal(value, other[name]), name
        assert alone._engine.lanes() == 0
        assert three._engine.lanes() == 3
        assert three._engine.intact()
        alone.close()
        three.close()
