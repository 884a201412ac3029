"""Captured steps of decoding give the CPU's bits, fused beside unfused layers too."""

import gguf
import numpy as np
import pytest

from isobit import numerics
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import fusions
from isobit.backends.cuda.fusions import decode_launches, step_attention
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.seed import SEED
from tests.helpers.synth import Q4_K_M, Geometry, write_model

from .cuda_emulator import EmulatedGpu
from .cuda_support import Buffers, open_cuda, open_gpu, ragged, same, sized
from .test_cuda_forward import check, short, weights  # noqa: F401


@pytest.mark.parametrize(
    ("kind", "planes", "at_once"),
    [("emulated", 1, 1), ("cuda", 1, None), ("cuda", 2, None), ("cuda", 2, 1), ("cuda", 2, 2)],
)
def test_decode_graph(weights, short, monkeypatch, kind, planes, at_once, rng):  # noqa: F811
    """at_once: tiles that blocks take at once, and that one holds; the fewer, the more it takes in
    turn."""
    weights = short if kind == "emulated" else weights
    if at_once:
        monkeypatch.setattr(step_attention, "tiles_at_once", lambda *_: at_once)
        monkeypatch.setattr(step_attention, "tile_buffers", lambda *_: at_once)
    engine = EngineConfig(activation_bits=8 * planes, context=512, max_sequences=1, chunk=256)
    backend, theirs = open_cuda(kind, weights, engine), CpuBackend(weights, engine)
    pages = rng.permutation(8).astype(np.int32)[None]
    vocab = weights.config.vocab
    first, steps = (127, 2) if kind == "emulated" else (250, 80)
    prompt = ragged(rng, vocab, [(0, first)], pages)
    same(backend.forward(prompt), theirs.forward(prompt))
    token = int(rng.integers(vocab))
    chosen = []
    for position in range(first, first + steps):
        one = ragged(rng, vocab, [(position, 1)], pages)
        one.tokens[0] = token
        logits = backend.forward(one)
        same(logits, theirs.forward(one))
        token = int(logits[0].argmax())
        chosen.append(token)
    again = backend.greedy(
        np.array(chosen[:1], np.int32), np.array([first + 1], np.int32), pages, steps - 1
    )
    assert again[:, 0].tolist() == chosen[1:]
    backend.close()
    theirs.close()


# Experts that nobody guesses, copies that hold parts of two places, more steps than are copied
# ahead, dense layers, and more superblocks than warps of x, of attention and of SwiGLU, and more
# words of x than threads: (geometry, multiprocessors, shared memory).
SHAPES = [
    ({"experts": 7, "experts_used": 3, "hidden": 768, "ffn": 256}, 4, 227 << 10),
    ({"experts": 40, "experts_used": 3, "hidden": 256, "ffn": 512}, 7, 227 << 10),
    ({"experts": 33, "experts_used": 18, "hidden": 512, "ffn": 256}, 5, 160 << 10),
    ({"experts": 0, "experts_used": 0, "hidden": 768, "ffn": 512}, 4, 227 << 10),
]
WIDE = {"layers": 1, "hidden": 4352, "heads": 68, "kv_heads": 4, "head_dim": 64, "ffn": 512}
WIDE |= {"experts": 14, "experts_used": 13}


@pytest.mark.parametrize(
    ("shape", "bulk", "few_tiles"),
    [
        *((s, bulk, 4) for s in SHAPES for bulk in (False, True)),
        (SHAPES[2], False, 0),
        ((WIDE, 40, 227 << 10), True, 4),
    ],
)
def test_decode_graph_of_other_shapes(tmp_path, monkeypatch, shape, bulk, few_tiles):
    """few_tiles 0: as if the tiles were many, which a kernel of their own merges."""
    print("seed", SEED)
    monkeypatch.setattr(step_attention, "FEW_TILES", few_tiles)
    geometry, multiprocessors, shared = shape
    path = write_model(tmp_path / "m.gguf", Geometry(**{"layers": 2} | geometry), seed=SEED)
    engine = EngineConfig(context=256, max_sequences=1, chunk=64)
    rng, pages = np.random.default_rng(SEED), np.arange(4, dtype=np.int32)[None]
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        gpu = EmulatedGpu(SEED, bulk=bulk)
        gpu.multiprocessors, gpu.shared_most = multiprocessors, shared
        ours, theirs = sized()(weights, engine, gpu), CpuBackend(weights, engine)
        assert "decode_down" in kernels_of_step(ours)
        for start, stop in ((0, 3), (3, 4), (4, 5)):
            one = ragged(rng, weights.config.vocab, [(start, stop - start)], pages)
            a, b = ours.forward(one), theirs.forward(one)
            assert np.array_equal(a.view(np.uint32), b.view(np.uint32)), start
        theirs.close()


@pytest.mark.parametrize("alike", [2, 38])
def test_experts_of_equal_probability(tmp_path, alike):
    """The first of them are chosen; 38 of 40 are more than a warp takes together."""
    print("seed", SEED)
    geometry, multiprocessors, _ = SHAPES[1]
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2, **geometry), seed=SEED)
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if "ffn_gate_inp" in tensor.name:
            rows = tensor.data.reshape(geometry["experts"], -1)
            assert np.shares_memory(rows, tensor.data)
            for first in range(0, len(rows) + 1 - alike, alike):
                rows[first : first + alike] = rows[first]
    engine = EngineConfig(context=128, max_sequences=1, chunk=64)
    rng, pages = np.random.default_rng(SEED), np.arange(2, dtype=np.int32)[None]
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        gpu = EmulatedGpu(SEED, bulk=True)
        gpu.multiprocessors = multiprocessors
        ours, theirs = sized()(weights, engine, gpu), CpuBackend(weights, engine)
        for position in range(4):
            one = ragged(rng, weights.config.vocab, [(position, 1)], pages)
            same(ours.forward(one), theirs.forward(one))
        theirs.close()


@pytest.mark.parametrize(
    ("kind", "planes", "n"),
    [("emulated", 2, 9), ("cuda", 1, 11), ("cuda", 2, 2), ("cuda", 2, 33), ("cuda", 2, 64)],
)
def test_steps_of_several_sequences(weights, short, kind, planes, n, rng):  # noqa: F811
    weights = short if kind == "emulated" else weights
    engine = EngineConfig(activation_bits=8 * planes, context=512, max_sequences=n, chunk=256)
    backend, theirs = open_cuda(kind, weights, engine), CpuBackend(weights, engine)
    pages = rng.permutation(8 * n).astype(np.int32).reshape(n, 8)
    vocab = weights.config.vocab
    longest, steps = (2, 2) if kind == "emulated" else (400, 6)
    lengths = rng.integers(1, longest + 1, n)
    lengths[0] = 64  # its next token is the first of a second tile
    for i, length in enumerate(lengths):
        part = ragged(rng, vocab, [(0, int(length))], pages[i : i + 1])
        backend.forward(part)
        theirs.forward(part)
    tokens, chosen = rng.integers(0, vocab, n).astype(np.int32), []
    for step in range(steps):
        one = ragged(rng, vocab, [(int(p) + step, 1) for p in lengths], pages)
        one.tokens[:] = tokens
        logits = backend.forward(one)
        same(logits, theirs.forward(one))
        tokens = logits.argmax(-1).astype(np.int32)
        chosen.append(tokens)
    again = backend.greedy(chosen[0], (lengths + 1).astype(np.int32), pages, steps - 1)
    assert np.array_equal(again, chosen[1:])
    backend.close()
    theirs.close()


def kernels_of_step(backend):
    """Names of the kernels of a step of one sequence."""
    found, gpu = [], backend._gpu
    launch, gpu.launch = gpu.launch, lambda *a, **_: found.append(a[1])
    backend._programs.one._queue(backend._programs.one._pass(many=False))
    gpu.launch = launch
    return found


FUSED_LAYER = [
    *("decode_qkv", "decode_attention", "decode_attn_out"),
    *("decode_router", "decode_gate_up", "decode_down"),
]


def test_a_layer_is_six_launches(weights):  # noqa: F811
    backend = open_cuda("emulated", weights, EngineConfig(context=256, max_sequences=1))
    layers = weights.config.n_layers
    assert kernels_of_step(backend) == ["embed", *FUSED_LAYER * layers, "decode_head"]


def test_launches_of_steps_together(weights):  # noqa: F811
    """Sums, norms and quantisation are one launch, also across layers."""
    engine = EngineConfig(context=256, max_sequences=2)
    backend, found = open_cuda("emulated", weights, engine), []
    backend._gpu.launch = lambda *a, **_: found.append(a[1])
    backend._programs.many._queue(backend._programs.many._pass(2))
    layer = [
        *("norm_quantise", "batch_matmul", "decode_attention", "batch_merge", "part_matmul"),
        *("norm_quantise", "matmul_dense", "router_top_k", "batch_matmul", "batch_matmul"),
    ]
    assert found[: 1 + 2 * len(layer)] == ["embed", *layer, *layer]
    assert found[-3:] == ["norm_quantise", "batch_matmul", "next_token"]


@pytest.mark.parametrize("unfused", ["0", "1", "2", "01", "02", "12", "012"])
def test_layers_op_by_op_beside_fused_ones(tmp_path, monkeypatch, unfused):
    """In each order, within the same captured step, the same bits."""
    print("seed", SEED)
    rng = np.random.default_rng(SEED)

    def refusing(claim):
        return lambda g, ops: None if str(ops[0].layer) in unfused else claim(g, ops)

    for kind, claims in fusions.CLAIMS.items():
        monkeypatch.setitem(fusions.CLAIMS, kind, tuple(map(refusing, claims)))
    geometry = Geometry(layers=3)
    path = write_model(tmp_path / "m.gguf", geometry, seed=SEED)
    engine = EngineConfig(context=256, max_sequences=2, chunk=64)
    pages = np.array([[3, 1], [0, 2]], np.int32)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, theirs = open_cuda("emulated", weights, engine), CpuBackend(weights, engine)
        names = kernels_of_step(ours)
        assert names.count("decode_qkv") == 3 - len(unfused)
        assert names.count("append") == 3 * len(unfused)
        for parts in ([(0, 3), (0, 2)], [(3, 1), (2, 1)], [(4, 1)]):
            check(ours, theirs, ragged(rng, weights.config.vocab, parts, pages))
        theirs.close()


def test_one_tensor_of_another_format_costs_its_layer_alone(tmp_path):
    """The rest of the model stays on the fast path, and so does the rest of the layer."""
    geometry = Geometry(layers=2)
    other = write_model(tmp_path / "n.gguf", geometry, {**Q4_K_M, "attn_output": "Q8_0"}, seed=1)
    path = write_model(tmp_path / "m.gguf", geometry, seed=1)
    engine = EngineConfig(context=128, max_sequences=1, chunk=64)
    with GGUFFile.open(path) as file, GGUFFile.open(other) as changed:
        graph, odd = Weights.from_file(file), Weights.from_file(changed).graph.weights
        name = "blk.1.attn_output.weight"
        weights = Weights(graph.config, graph.graph.with_weights({name: odd[name]}))
        ours, theirs = open_cuda("emulated", weights, engine), CpuBackend(weights, engine)
        names = kernels_of_step(ours)
        assert names[:7] == ["embed", *FUSED_LAYER]
        assert names[-1] == "decode_head"
        assert {"decode_attention", "batch_matmul", "matmul_blocks"} <= set(names[7:])
        batch = ragged(np.random.default_rng(SEED), 320, [(0, 1)], np.array([[1]], np.int32))
        check(ours, theirs, batch)
        theirs.close()


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
    positions = np.array([tiles * 64 - 1], np.int32)
    defines = {"PLANES": 2, "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim}
    gpu.launch(
        "fusions/decode/decode_merge",
        "decode_merge",
        (heads * head_dim // 32,),
        (b.put(positions), b.put(pairs), b.put(tile_out), most, result, 0, 0),
        shared=decode_launches.MERGE_SHARED,
        defines={k: str(v) for k, v in defines.items()},
    )
    same(b.get(result, expected.shape), expected)
    gpu.close()
