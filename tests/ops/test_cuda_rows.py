"""Steps of a few rows, which have kernels of their own, give each row the bits it has alone."""

import numpy as np
import pytest

from isobit.backends.base import Batch
from isobit.backends.cpu import CpuBackend
from isobit.backends.cuda import CudaBackend
from isobit.backends.cuda.fusions import step_attention
from isobit.backends.cuda.ops import part_matmul
from isobit.config import EngineConfig
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from tests.helpers.seed import SEED
from tests.helpers.synth import Geometry, write_model

from .cuda_emulator import EmulatedGpu
from .cuda_support import open_gpu, ragged, same, sized
from .test_cuda_decode import SHAPES
from .test_cuda_forward import check


def launched(backend):
    """Names of the kernels that will have been launched."""
    names, launch = [], backend._gpu.launch
    backend._gpu.launch = lambda *a, **k: (names.append(a[1]), launch(*a, **k))[1]
    return names


def guess_with_the_next_layer(backend):
    """Let each layer guess its experts with another one's router: mostly wrong ones."""
    matrices = backend._programs.resident.weights.matrices
    own = [matrices[f"blk.{i}.ffn_gate_inp.weight"].address for i in range(2)]
    other, launch = dict(zip(own, own[1:] + own[:1], strict=True)), backend._gpu.launch

    def wrong(stem, kernel, grid, arguments, **more):
        if kernel == "decode_attn_out":
            arguments = (*arguments[:7], other[arguments[7]], *arguments[8:])
        launch(stem, kernel, grid, arguments, **more)

    backend._gpu.launch = wrong


class Texts:
    """Sequences that grow by random tokens, alike on both backends."""

    def __init__(self, rng, vocab, pages, *backends):
        self.rng, self.vocab, self.pages, self.backends = rng, vocab, pages, backends
        self.ends = [0] * len(pages)

    def batch(self, parts, every):
        """So many tokens more of these sequences: (sequence, tokens)."""
        at = [(self.ends[s], n) for s, n in parts]
        for s, n in parts:
            self.ends[s] += n
        made = ragged(self.rng, self.vocab, at, self.pages[[s for s, _ in parts]])
        rows = np.arange(len(made.tokens), dtype=np.int32)
        more = (made.pages, rows if every else made.logit_rows)
        return Batch(made.tokens, made.positions, made.sequence, *more)

    def go_on(self, *parts, every=True):
        """The same logits, and what the step shows of itself."""
        ours, theirs = self.backends
        batch = self.batch(parts, every)
        same(ours.forward(batch), theirs.forward(batch))
        return batch


@pytest.mark.parametrize(
    ("shape", "rows", "bulk", "few_tiles", "planes"),
    [
        (SHAPES[0], 2, False, 1, 2),
        (SHAPES[2], 3, True, 4, 1),
        (SHAPES[3], 2, True, 1, 2),
    ],
)
def test_rows(tmp_path, monkeypatch, shape, rows, bulk, few_tiles, planes):
    """Of several sequences, of one, and of both, around the edge of a tile of keys; few_tiles 1:
    two tiles are merged by a kernel of their own. Guesses are right, and then mostly wrong."""
    print("seed", SEED)
    monkeypatch.setattr(step_attention, "FEW_TILES", few_tiles)
    geometry, multiprocessors, _ = shape
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2, **geometry), seed=SEED)
    engine = EngineConfig(activation_bits=8 * planes, context=256, max_sequences=rows, chunk=64)
    rng = np.random.default_rng(SEED)
    pages = rng.permutation(4 * rows).astype(np.int32).reshape(rows, 4)
    gpu = EmulatedGpu(SEED, bulk=bulk)
    gpu.multiprocessors = multiprocessors
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, theirs = sized(few=(rows,))(weights, engine, gpu), CpuBackend(weights, engine)
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        texts.go_on(*((s, 3 if s else 63 - rows // 2) for s in range(rows)), every=False)
        names = launched(ours)
        texts.go_on((0, rows))  # drafts, of which some are in the next tile
        assert names.count("decode_down") == 2, names
        together = [(s, 1) for s in range(rows)]
        texts.go_on(*together)
        if rows > 2:
            texts.go_on((1, 1), (0, rows - 1))
        if geometry["experts"]:
            guess_with_the_next_layer(ours)
            texts.go_on((rows - 1, rows))
            texts.go_on(*together)
        batch = texts.batch(together, every=True)
        ends = np.array(texts.ends, np.int32) - 1
        expected = theirs.greedy(batch.tokens, ends, pages, 3)
        assert np.array_equal(ours.greedy(batch.tokens, ends, pages, 3), expected)
        assert ("decode_merge" in names) == (few_tiles == 1), names
        theirs.close()


def test_stages_of_rows(tmp_path):
    """A tap sees what rows have alone."""
    print("seed", SEED)
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2), seed=SEED)
    engine = EngineConfig(context=128, max_sequences=2, chunk=64)
    rng, pages = np.random.default_rng(SEED), np.array([[3, 1], [0, 2]], np.int32)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, theirs = (
            sized(few=(2,))(weights, engine, open_gpu("emulated")),
            CpuBackend(weights, engine),
        )
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        texts.go_on((0, 2), (1, 3), every=False)
        names = launched(ours)
        check(ours, theirs, texts.batch([(0, 1), (1, 1)], every=True))
        check(ours, theirs, texts.batch([(1, 2)], every=True))
        assert {"decode_gate_up", "decode_down"} <= set(names)
        theirs.close()


@pytest.mark.parametrize("kind", ["emulated", "cuda"])
def test_graphs_of_padded_sizes(tmp_path, kind):
    """Steps and mixed batches between and at the sizes, with and without logits: captured once and
    replayed."""
    print("seed", SEED)
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2), seed=SEED)
    rng, n = np.random.default_rng(SEED), 7
    engine = EngineConfig(context=256, max_sequences=n, chunk=64)
    pages = rng.permutation(4 * n).astype(np.int32).reshape(n, 4)
    backend = sized(padded=(4, 8, 12))
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, theirs = backend(weights, engine, open_gpu(kind)), CpuBackend(weights, engine)
        ran = []
        ours._gpu.replay = lambda graph, replay=ours._gpu.replay: (ran.append(graph), replay(graph))
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        texts.go_on((0, 20), (1, 3), every=False)  # too many
        assert not ran
        for every in (False, True):
            texts.go_on((0, 1), (1, 1), (2, 5), every=every)
        texts.go_on((3, 2), every=False)
        texts.go_on((0, 3), (1, 9))
        mixed = ours._programs.mixed
        assert {*ran} <= {*mixed.bodies.made.values(), *mixed.rows.made.values()}
        assert len(ran) == 8
        check(ours, theirs, texts.batch([(0, 2), (4, 5)], every=True))  # launched one by one
        ran.clear()
        for sequences in (7, 5, 4):
            texts.go_on(*((s, 1) for s in range(sequences)))
        batch = texts.batch([(s, 1) for s in range(6)], every=True)
        ends = np.array(texts.ends[:6], np.int32) - 1
        expected = theirs.greedy(batch.tokens, ends, pages[:6], 3)
        assert np.array_equal(ours.greedy(batch.tokens, ends, pages[:6], 3), expected)
        many = ours._programs.many
        assert {*many.graphs.made} == {(4, True), (8, True)}
        assert {*ran} == {*many.graphs.made.values()}
        ours.close()
        theirs.close()


def test_prompts_alone_and_long_ones_are_not_for_graphs(tmp_path):
    """Large batches of prompts without steps, and those that attend to much, are launched one by
    one: attention takes several tokens at once there."""
    path = write_model(tmp_path / "m.gguf", Geometry(layers=1, context=4096))
    engine = EngineConfig(context=4096, max_sequences=4, chunk=512)
    with GGUFFile.open(path) as file:
        backend = CudaBackend(Weights.from_file(file), engine, EmulatedGpu())
    mixed, each = backend._programs.mixed, np.arange(64, dtype=np.int32)
    for parts, taken in (
        ([(0, 512)], False),
        ([(0, 256)], True),
        ([(0, 150), (0, 150)], False),
        ([(900, 1), (0, 511)], True),
        ([(900, 1), (0, 512)], False),
        ([(900, 1), (3000, 100)], False),
        ([(900, 1), (3000, 80)], True),
    ):
        lengths = [n for _, n in parts]
        positions = np.concatenate([np.arange(at, at + n, dtype=np.int32) for at, n in parts])
        sequence = np.repeat(each[: len(parts)], lengths)
        pages = np.tile(each, (len(parts), 1))
        batch = Batch(positions, positions, sequence, pages, each[:0])
        assert mixed.takes(batch) == taken, parts
    backend.close()


def test_mixed_batches_of_many_tokens_on_a_gpu(tmp_path):
    """Steps beside prompts, up to the largest size."""
    print("seed", SEED)
    gpu, rng = open_gpu("cuda"), np.random.default_rng(SEED)
    path = write_model(tmp_path / "m.gguf", Geometry(layers=2, context=1024), seed=SEED)
    engine = EngineConfig(context=1024, max_sequences=4, chunk=512)
    pages = rng.permutation(64).astype(np.int32).reshape(4, 16)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, theirs = CudaBackend(weights, engine, gpu), CpuBackend(weights, engine)
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        texts.go_on((0, 5), (1, 3), every=False)
        for parts in ([(0, 1), (2, 300)], [(0, 1), (1, 1), (2, 100), (3, 399)]):
            texts.go_on(*parts)
            texts.go_on(*((s, 1) for s, _ in parts))
        mixed = ours._programs.mixed
        assert mixed is not None
        assert {384, 512} <= {*mixed.bodies.made}
        ours.close()
        theirs.close()


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_rows_on_a_gpu(tmp_path, rows, planes):
    print("seed", SEED)
    gpu = open_gpu("cuda")
    geometry = Geometry(layers=3, experts=64, experts_used=6, hidden=1024, ffn=512)
    path = write_model(tmp_path / "m.gguf", geometry, seed=SEED)
    engine = EngineConfig(activation_bits=8 * planes, context=512, max_sequences=rows, chunk=256)
    rng = np.random.default_rng(SEED)
    pages = rng.permutation(8 * rows).astype(np.int32).reshape(rows, 8)
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        ours, theirs = sized(few=(rows,))(weights, engine, gpu), CpuBackend(weights, engine)
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        texts.go_on(*((s, 250 - 7 * s) for s in range(rows)), every=False)
        together = [(s, 1) for s in range(rows)]
        for _ in range(12):
            texts.go_on(*together)
            texts.go_on((int(rng.integers(rows)), rows))
        batch = texts.batch(together, every=True)
        ends = np.array(texts.ends, np.int32) - 1
        expected = theirs.greedy(batch.tokens, ends, pages, 40)
        assert np.array_equal(ours.greedy(batch.tokens, ends, pages, 40), expected)
        ours.close()
        theirs.close()


@pytest.mark.parametrize(("most", "shape"), [(64, (2, 10)), (7, (1, 3))])
def test_products_in_parts(tmp_path, monkeypatch, most, shape):
    """Steps of several sequences leave products in parts, which the kernels behind add up; larger
    ones do not. Stages are read as a whole."""
    print("seed", SEED)
    monkeypatch.setattr(part_matmul, "_PART_TOKENS", most)
    monkeypatch.setattr(part_matmul, "_PART_SHAPES", (shape,))
    geometry = Geometry(layers=2, hidden=768, heads=8, head_dim=64)
    path = write_model(tmp_path / "m.gguf", geometry, seed=SEED)
    rng, n = np.random.default_rng(SEED), 19
    engine = EngineConfig(context=128, max_sequences=n, chunk=64)
    pages = rng.permutation(2 * n).astype(np.int32).reshape(n, 2)
    gpu = open_gpu("emulated")
    gpu.multiprocessors = 6
    with GGUFFile.open(path) as file:
        weights = Weights.from_file(file)
        sizes = (3, 7, 12, n)
        ours, theirs = sized(padded=sizes)(weights, engine, gpu), CpuBackend(weights, engine)
        texts = Texts(rng, weights.config.vocab, pages, ours, theirs)
        names = launched(ours)
        texts.go_on((1, 3), (2, 2))
        assert names.count("part_matmul") == 2, "the attention output of each layer"
        for sequences in sizes:
            together = [(s, 1) for s in range(sequences)]
            names.clear()
            check(ours, theirs, texts.batch(together, every=True))
            in_parts = sequences <= most and sequences not in part_matmul._WHOLE
            assert ("part_matmul" in names) == in_parts, names
            texts.go_on(*together)
        ours.close()
        theirs.close()
