"""The decode graph gives the bits of the same step run kernel by kernel."""

import numpy as np
import pytest

from isobit import numerics
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend, decode
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.synth import Geometry, write_model

from .cuda_emulator import EmulatedGpu
from .cuda_support import SEED, Buffers, open_cuda, open_gpu, ragged, same
from .test_cuda_forward import weights  # noqa: F401


@pytest.mark.parametrize(
    ("kind", "planes", "at_once"),
    [("emulated", 1, 1), ("cuda", 1, None), ("cuda", 2, None), ("cuda", 2, 1), ("cuda", 2, 2)],
)
def test_decode_graph(weights, monkeypatch, kind, planes, at_once):  # noqa: F811
    """at_once: tiles that blocks take at once, and that one holds; the fewer, the more it takes in
    turn."""
    print("seed", SEED)
    if at_once:
        monkeypatch.setattr(decode, "attention_tiles", lambda *_: at_once)
        monkeypatch.setattr(decode, "attention_buffers", lambda *_: at_once)
    rng = np.random.default_rng(SEED)
    engine = EngineConfig(activation_planes=planes, context=512, max_sequences=1, chunk=256)
    backend = open_cuda(kind, weights, engine)
    assert backend._decoder is not None
    pages = rng.permutation(8).astype(np.int32)[None]
    vocab = weights.config.vocab
    first, steps = (127, 2) if kind == "emulated" else (250, 80)
    backend.forward(ragged(rng, vocab, [(0, first)], pages))
    token = int(rng.integers(vocab))
    chosen = []
    for position in range(first, first + steps):
        one = ragged(rng, vocab, [(position, 1)], pages)
        one.tokens[0] = token
        plain = backend.forward(one, lambda *_: None, frozenset())
        fused = backend.forward(one)
        assert np.array_equal(plain.view(np.uint32), fused.view(np.uint32)), position
        token = int(fused[0].argmax())
        chosen.append(token)
    again = backend.greedy(
        np.array(chosen[:1], np.int32), np.array([first + 1], np.int32), pages, steps - 1
    )
    assert again[:, 0].tolist() == chosen[1:]
    backend.close()


# Experts that nobody guesses, copies that hold parts of two places, more steps than are copied
# ahead, more superblocks than warps, dense layers: (geometry, multiprocessors, shared memory).
SHAPES = [
    ({"experts": 7, "experts_used": 3, "hidden": 768, "ffn": 256}, 4, 227 << 10),
    ({"experts": 40, "experts_used": 3, "hidden": 256, "ffn": 512}, 7, 227 << 10),
    ({"experts": 33, "experts_used": 18, "hidden": 512, "ffn": 256}, 5, 160 << 10),
    ({"experts": 0, "experts_used": 0, "hidden": 768, "ffn": 512}, 4, 227 << 10),
]


@pytest.mark.parametrize(
    ("shape", "bulk", "few_tiles"),
    [*((s, bulk, 4) for s in SHAPES for bulk in (False, True)), (SHAPES[2], False, 0)],
)
def test_decode_graph_of_other_shapes(tmp_path, monkeypatch, shape, bulk, few_tiles):
    """few_tiles 0: as if the tiles were many, which a kernel of their own merges."""
    print("seed", SEED)
    monkeypatch.setattr(decode, "_FEW_TILES", few_tiles)
    geometry, multiprocessors, shared = shape
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2, **geometry), seed=SEED)
    engine = EngineConfig(context=256, max_sequences=1, chunk=64)
    rng, pages = np.random.default_rng(SEED), np.arange(4, dtype=np.int32)[None]
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        gpu = EmulatedGpu(SEED, bulk=bulk)
        gpu.multiprocessors, gpu.shared_most = multiprocessors, shared
        ours, theirs = CudaBackend(weights, engine, gpu), CpuBackend(weights, engine)
        assert ours._decoder is not None
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            one = ragged(rng, weights.config.vocab, [(start, stop - start)], pages)
            a, b = ours.forward(one), theirs.forward(one)
            assert np.array_equal(a.view(np.uint32), b.view(np.uint32)), start
        theirs.close()


@pytest.mark.parametrize(
    ("kind", "planes", "n"),
    [("emulated", 2, 9), ("cuda", 1, 11), ("cuda", 2, 2), ("cuda", 2, 33), ("cuda", 2, 64)],
)
def test_steps_of_several_sequences(weights, kind, planes, n):  # noqa: F811
    print("seed", SEED)
    rng = np.random.default_rng(SEED)
    engine = EngineConfig(activation_planes=planes, context=512, max_sequences=n, chunk=256)
    backend = open_cuda(kind, weights, engine)
    assert backend._batch_decoder is not None
    pages = rng.permutation(8 * n).astype(np.int32).reshape(n, 8)
    vocab = weights.config.vocab
    longest, steps = (2, 2) if kind == "emulated" else (400, 6)
    lengths = rng.integers(1, longest + 1, n)
    for i, length in enumerate(lengths):
        part = ragged(rng, vocab, [(0, int(length))], pages[i : i + 1])
        backend.forward(part, lambda *_: None, frozenset())
    tokens, chosen = rng.integers(0, vocab, n).astype(np.int32), []
    for step in range(steps):
        one = ragged(rng, vocab, [(int(p) + step, 1) for p in lengths], pages)
        one.tokens[:] = tokens
        fused = backend.forward(one)
        plain = backend.forward(one, lambda *_: None, frozenset())
        assert np.array_equal(plain.view(np.uint32), fused.view(np.uint32)), step
        tokens = fused.argmax(-1).astype(np.int32)
        chosen.append(tokens)
    again = backend.greedy(chosen[0], (lengths + 1).astype(np.int32), pages, steps - 1)
    assert np.array_equal(again, chosen[1:])
    backend.close()


@pytest.mark.parametrize("kind", ["emulated", "cuda"])
@pytest.mark.parametrize("tiles", [1, 31, 72, 600])
def test_merge_of_many_tiles(kind, tiles):
    heads, kv_heads, head_dim, most = 4, 2, 64, tiles + 3
    rng = np.random.default_rng(SEED)
    m = np.round(rng.standard_normal((tiles, heads)) * 20).astype(np.float32)
    l, o = (  # noqa: E741
        rng.random((tiles, heads)).astype(np.float32) + 1,
        rng.standard_normal((tiles, heads, head_dim)).astype(np.float32),
    )
    o[0, :, ::7] = -0.0
    total, out, top = l[0], o[0], m[0]
    for t in range(1, tiles):
        new = np.maximum(top, m[t])
        a, b = numerics.exp(top - new), numerics.exp(m[t] - new)
        total = total * a + l[t] * b
        out = out * a[:, None] + o[t] * b[:, None]
        top = new
    expected = out * (np.float32(1) / total)[:, None]

    gpu = open_gpu(kind)
    group = heads // kv_heads
    pairs = np.zeros((kv_heads, most, group, 2), np.float32)
    tile_out = np.zeros((kv_heads, most, group, head_dim), np.float32)
    for h in range(heads):
        pairs[h // group, :tiles, h % group] = np.stack([m[:, h], l[:, h]], -1)
        tile_out[h // group, :tiles, h % group] = o[:, h]
    b = Buffers(gpu)
    result = b.new(expected.nbytes)
    step = np.array([0, tiles * 64 - 1, 0, 0], np.int32)
    defines = {"PLANES": 2, "HIDDEN": 256, "HEADS": heads, "KV_HEADS": kv_heads}
    defines |= {"HEAD_DIM": head_dim, "FFN": 256, "EXPERTS": 4, "USED": 2}
    gpu.launch(
        "decode_merge",
        "decode_merge",
        (heads * head_dim // 32,),
        (b.put(step), b.put(pairs), b.put(tile_out), most, result),
        shared=decode.MERGE_SHARED,
        defines={k: str(v) for k, v in defines.items()},
    )
    same(b.get(result, expected.shape), expected)
    gpu.close()
