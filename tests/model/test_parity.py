"""Every backend's bits are the reference's: any chunking, thread count and SIMD level.

Bit patterns are compared, logits of every token. A backend that cannot run here is "not run".
"""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from isobit.backends.base import F32
from isobit.gguf.formats import FORMATS
from isobit.gguf.reader import GGUFFile
from isobit.text.tokenizer import Tokenizer
from tests.helpers import passes
from tests.helpers.passes import run, same_bits
from tests.helpers.synth import Geometry, all_in, write_model
from tests.model.accuracy import ROOT, SAMPLE

N = 66  # tokens: a tile of keys and two more
SIMD_LEVELS = ("avx512amx", "avx512vnni", "avx2", "neon_i8mm", "neon", "portable")
SHAPES = {
    "head_dim 64, 16 experts top-4": Geometry(heads=8, experts=16, experts_used=4, layers=1),
    "128 experts top-8": Geometry(experts=128, experts_used=8, layers=1),
    "one expert": Geometry(experts=1, experts_used=1, layers=1),
    "head_dim 256": Geometry(head_dim=256, heads=2, kv_heads=1, layers=1),
    "dense, tied": Geometry(experts=0, tied=True, layers=1),
    "wide": Geometry(hidden=768, heads=12, kv_heads=4, ffn=512, experts=3, layers=1),
}
RAGGED = {
    "hidden 32": Geometry(hidden=32, heads=1, kv_heads=1, head_dim=32, ffn=32, layers=1),
    "hidden 288, ffn 96": Geometry(hidden=288, heads=6, kv_heads=3, head_dim=48, ffn=96, layers=1),
}


@pytest.fixture(scope="module")
def expected(heldout: list[int]) -> dict[int, F32]:
    """The reference's logits over the sample model, by number of planes, in one pass."""
    found = {}
    for planes in (1, 2):
        with passes.backend_of(SAMPLE, "reference", planes) as reference:
            found[planes] = run(reference, heldout[:N])
    return found


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("simd", SIMD_LEVELS)
def test_cpu_on_the_sample(
    simd: str, threads: int, planes: int, heldout: list[int], expected: dict[int, F32]
) -> None:
    with passes.backend_of(SAMPLE, "cpu", planes, threads=threads, simd=simd) as cpu:
        for chunk in (1, 7, 64, None):
            logits = run(cpu, heldout[:N], chunk=chunk)
            assert same_bits(logits, expected[planes]), f"chunk {chunk}"


def stages_of(path: Path, name: str, ids: list[int]) -> list[tuple[str, NDArray[np.generic]]]:
    """Every traced stage of one pass, in order, with its layer in the name."""
    seen: list[tuple[str, NDArray[np.generic]]] = []

    def keep(stage: str, layer: int | None, value: NDArray[np.generic]) -> None:
        seen.append((f"{stage} {layer}", np.array(value)))

    with passes.backend_of(path, name) as backend:
        run(backend, ids, tap=keep)
    return seen


@pytest.mark.parametrize("name", [b for b in passes.BACKENDS if b != "reference"])
@pytest.mark.parametrize("model", ["sample", "dense"])
def test_stages(model: str, name: str, heldout: list[int], tmp_path: Path) -> None:
    """Each stage by itself, so that a difference is found where it begins."""
    path, ids = SAMPLE, heldout[:70]
    if model == "dense":
        path, ids = write_model(tmp_path / "model.gguf", SHAPES["dense, tied"]), list(range(70))
    expected, found = stages_of(path, "reference", ids), stages_of(path, name, ids)
    assert [stage for stage, _ in found] == [stage for stage, _ in expected]
    for (stage, a), (_, b) in zip(expected, found, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), stage
        assert a.tobytes() == b.tobytes(), stage


def check_model(path: Path, vocab: int, name: str, rng: np.random.Generator) -> None:
    ids = rng.integers(0, vocab, 70).tolist()
    for planes in (1, 2):
        with (
            passes.backend_of(path, "reference", planes) as reference,
            passes.backend_of(path, name, planes) as other,
        ):
            expected = run(reference, ids)
            assert np.isfinite(expected).all()
            assert same_bits(run(other, ids, chunk=64), expected)


@pytest.mark.parametrize("name", [b for b in passes.BACKENDS if b != "reference"])
@pytest.mark.parametrize("fmt", [f.name for f in FORMATS.values()])
def test_formats(fmt: str, name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Every matrix in one format, the embedding, the router and the output too."""
    geometry = Geometry(layers=1, experts=4)
    seed = int(rng.integers(1 << 32))
    path = write_model(tmp_path / "model.gguf", geometry, all_in(fmt, router=fmt), seed=seed)
    check_model(path, geometry.vocab, name, rng)


@pytest.mark.parametrize("name", [b for b in passes.BACKENDS if b != "reference"])
@pytest.mark.parametrize("shape", [*SHAPES, *RAGGED])
def test_shapes(shape: str, name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    formats = all_in("Q8_0") if shape in RAGGED else {**all_in("Q4_K"), "ffn_down": "Q6_K"}
    geometry = (SHAPES | RAGGED)[shape]
    seed = int(rng.integers(1 << 32))
    path = write_model(tmp_path / "model.gguf", geometry, formats, seed=seed)
    check_model(path, geometry.vocab, name, rng)


@pytest.mark.parametrize("name", [b for b in passes.BACKENDS if b != "reference"])
def test_real_vocabulary(name: str, tmp_path: Path) -> None:
    """151,936 rows of embedding and output, and the tokenizer that goes with them."""
    vocabulary = ROOT / "tests/data/qwen2-vocab.gguf"
    geometry = Geometry(layers=1, experts=4)
    path = write_model(tmp_path / "model.gguf", geometry, vocabulary=vocabulary)
    with GGUFFile.open(path) as file:
        ids = Tokenizer.from_metadata(file.metadata, str(path)).encode("def f(x):", special=False)
    ids = [*ids, 0, 151935]
    with passes.backend_of(path, "reference") as reference, passes.backend_of(path, name) as other:
        expected = run(reference, ids)
        assert expected.shape == (len(ids), 151936)
        assert same_bits(run(other, ids), expected)
