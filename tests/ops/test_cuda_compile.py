"""Every CUDA kernel compiles for the promised architectures, also on machines without a GPU.

A backend whose device runs nothing tells which kernels the sample asks for, and with which
definitions; the formats that it does not hold are added.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from isobit.backends.base import ARGMAX, Batch, Following, Wanted
from isobit.backends.base.draws import Draws
from isobit.backends.cpu.sampler import Columns, Row
from isobit.backends.cuda import CudaBackend, UnfusedCudaBackend
from isobit.backends.cuda.device import compile
from isobit.backends.cuda.device.layout import Layout
from isobit.config import EngineConfig
from isobit.gguf.formats import FORMATS
from isobit.gguf.reader import GGUFFile
from isobit.model.weights import Weights
from isobit.runtime.model import sample_path
from tests.helpers.expected import needs

from . import test_cuda_hybrid
from .cases import CASES, pointwise, products, recurrent, routing
from .cuda_emulator import EmulatedGpu
from .cuda_support import sized
from .harness import written


class Recorder(EmulatedGpu):
    multiprocessors = 132

    def __init__(self):
        super().__init__()
        self.asked = set()

    def launch(self, stem, kernel, grid, arguments, *, defines=None, **_):  # noqa: ARG002
        self.asked.add((stem, tuple(sorted((defines or {}).items()))))


HYBRID = Path(__file__).parents[1] / "data" / "pyhybrid-moe-34m-Q4_K_M.gguf"


OTHERS = (
    *(pointwise.bias, pointwise.rope, pointwise.clamped_gate, pointwise.gelu_gate),
    *(pointwise.softcap, pointwise.scale, pointwise.multiply, pointwise.join),
    *(products.expert_bias, routing.expert_scale, pointwise.relu_squared, recurrent.gated_delta),
    *(recurrent.causal_conv, pointwise.silu),
)
"""Cases of operations that neither model has."""


FLAGGED = {"WIDE": "1024", "LANES": "256", "MOVED": "4", "FLAGGED": "1", "BLOCKS": "132"}
"""Of ops/gather.cu."""


@pytest.fixture(scope="module")
def kernels():
    gpu = Recorder()
    engine = EngineConfig(context=512, max_sequences=4, chunk=128)
    pages = np.arange(32, dtype=np.int32).reshape(4, 8)
    sample, hybrid = (Weights.from_file(GGUFFile.open(p)) for p in (sample_path(), HYBRID))
    for weights, kind in (
        (sample, sized()),
        (sample, CudaBackend),
        (sample, UnfusedCudaBackend),
        (hybrid, CudaBackend),
        (test_cuda_hybrid.made(), CudaBackend),
    ):
        backend = kind(weights, engine, gpu)
        for first, n in ((0, 128), (0, 3), (0, 1), (300, 1)):  # prompts, and steps of one sequence
            at = np.arange(first, first + n, dtype=np.int32)
            backend.forward(Batch(at, at, 0 * at, pages, np.array([n - 1], np.int32)))
        for n in (2, 3, 4):
            each = np.arange(n, dtype=np.int32)
            backend.forward(Batch(each, 0 * each, each, pages, each))
        then = Following(Batch(-1 - each[:1], each[1:2], each[:1], pages[:1], each[:1]))
        backend.run(Batch(each, 0 * each, each, pages, each), replace(ARGMAX, following=then))
    each = np.arange(2, dtype=np.int32)
    held = [(0, lambda mask: mask.fill(1))]
    columns = Columns.of([Row(1, 40, 0.9)] * 2, 8192)
    draws = Draws(each, columns, each.astype(np.uint64), held=held)
    backend.run(Batch(each, 0 * each, each, pages, each), Wanted(False, drawn=draws, digests=True))
    backend.read_bandwidth()
    for case in CASES:
        if case.write in OTHERS:
            backend = UnfusedCudaBackend(written(case).weights, engine, gpu)
            backend.forward(Batch(each, each, 0 * each, pages, each[:1]))
    for stem, defines in list(gpu.asked):  # what other shapes and devices ask for
        if stem == "ops/batch_matmul":
            other = {**dict(defines), "COLUMNS": "32"}
            gpu.asked.add((stem, tuple(sorted(other.items()))))
            other |= {"BLOCK": "512", "COLUMNS": "16", "AT_ONCE": "1"}
            if ("GATED", "1") not in defines:
                gpu.asked.add((stem, tuple(sorted({**dict(defines), "SPLIT": "1"}.items()))))
                gpu.asked.add((stem, tuple(sorted({**other, "SPLIT": "1"}.items()))))
        if stem == "fusions/decode/decode_attention":
            other = {**dict(defines), "HEADS": "24", "KV_HEADS": "2", "HEAD_DIM": "64"}
            gpu.asked.add((stem, tuple(sorted({**other, "BUFFERS": "1"}.items()))))
    for f in FORMATS.values():
        tiled = [Layout("tiled", f)] if f.name in ("IQ4_NL", "IQ4_XS", "MXFP4") else []
        for layout in (Layout("blocks" if f.quantized else "floats", f), *tiled):
            stem, _, defines = layout.matmul
            extra = {"ROWS": "8"} if layout.kind == "floats" else {}
            gpu.asked.add((stem, tuple(sorted({**defines, **extra, "PLANES": "2"}.items()))))
            embedding = {**layout.embedding_defines, "PLANES": "2"}
            gpu.asked.add(("ops/embedding", tuple(sorted(embedding.items()))))
    split = {"BOUNDS": "0,1024,2048", "PLANES": "2"}  # by a part of a model
    for how in ({"WIDE": "256", "LANES": "256", "MOVED": "1", "BLOCKS": "132"}, FLAGGED):
        gpu.asked.add(("ops/gather", tuple(sorted({**split, **how}.items()))))
    gpu.asked.add(("ops/collect", tuple(sorted(split.items()))))
    experts = {"BOUNDS": "0,48,128", "BLOCKS": "132", "MOVED": "4"}
    gpu.asked.add(("ops/gather_experts", tuple(sorted({**split, **experts}.items()))))
    gpu.asked.add(("ops/exchanges", ()))
    gpu.asked.add(("ops/meet", tuple(sorted({**split, "BLOCKS": "132"}.items()))))
    mirrored = {"MIRRORED": "2", "PLANES": "2"}
    gpu.asked.add(("ops/send", tuple(sorted(mirrored.items()))))
    attention = {**mirrored, "HEAD": "128", "STAGE": "2", "OUT_HEADS": "32"}
    gpu.asked.add(("ops/attention_mma", tuple(sorted(attention.items()))))
    for how in ((), (("APART", "1"),)):
        gpu.asked.add(("ops/attention_wgmma", (*how, ("PLANES", "2"))))
    gpu.asked.add(("ops/attention_wgmma", (("PLANES", "2"), ("TURNS", "1"))))
    prompts = {"BLOCK": "512", "COLUMNS": "32", "DEPTH": "1", "PLANES": "2", "WEIGHT": "TiledQ4_K"}
    for how in ({"MORE": "TiledQ6_K"}, {"SUPERS_AT_ONCE": "4"}, {"GATED": "1", "WEIGHED": "1"}):
        gpu.asked.add(("ops/batch_matmul", tuple(sorted({**prompts, **how}.items()))))
    for columns, parts, held in (("16", "1", "8"), ("32", "1", "8"), ("32", "2", "4")):
        head = {"COLUMNS": columns, "PARTS": parts, "HELD": held, "DEPTH": "2"}
        head |= {"BLOCK": "384", "PLANES": "2"}
        gpu.asked.add(("ops/head_wgmma", tuple(sorted(head.items()))))
    gpu.asked.add(
        ("ops/attention_wgmma", (("MIRRORED", "2"), ("OUT_HEADS", "32"), ("PLANES", "2")))
    )
    for name, stages in (("Q4_K", "3"), ("Q6_K", "2")):  # of wider products than the sample has
        for narrow in ({}, {"NARROW": "1"}):
            how = {f"MMA_{name}": "1", "STAGES": stages, "PLANES": "2", **narrow}
            gpu.asked.add(("ops/matmul_mma", tuple(sorted(how.items()))))
    return sorted(gpu.asked)


def test_all_files_are_asked_for(kernels):
    there = (p.relative_to(compile.SOURCES) for p in compile.SOURCES.rglob("*.cu"))
    assert {stem for stem, _ in kernels} == {str(p.with_suffix("")) for p in there}


def test_every_kernel_waits_for_those_before_it():
    """It may be launched to overlap: what does not wait, races."""
    for path in compile.SOURCES.rglob("*.cu"):
        if path.parent.name != "device":
            parts = path.read_text().split("KERNEL(")[1:]
            assert all("begin();" in p or "wait_for_previous();" in p for p in parts), path


def of_parts(kernels):
    """Some kernels as a part of a split model asks for them."""
    wanted = ("fusions/decode/decode_attn_out", ()), ("ops/batch_matmul", ("FLOATS",))
    wanted += ("ops/batch_matmul", ("GATED",)), ("ops/norm_quantise", ("WEIGHTED",))
    cuts = {"BOUNDS": "0,256,512", "SENT_BOUNDS": "0,256,512", "MADE": "256"}
    for stem, names in wanted:
        found = next(d for s, d in kernels if s == stem and set(names) <= dict(d).keys())
        yield stem, tuple(sorted({**dict(found), **cuts}.items()))


def covering(kernels, rng):
    """Some of the kernels, by chance: each definition of each file, and its absence, in one."""
    names = {stem: {n for s, d in kernels for n, _ in d if s == stem} for stem, _ in kernels}
    seen = set()
    for i in rng.permutation(len(kernels)):
        stem, defines = kernels[i]
        mine = {(stem, name, dict(defines).get(name)) for name in names[stem]} or {stem}
        if mine - seen:
            yield kernels[i]
        seen |= mine


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_120"])
def test_kernels_compile(kernels, arch, tmp_path, monkeypatch, rng):
    """For one architecture with each definition that a file may have, which finds what is wrong in
    any; for the others a kernel of each file: what depends on the architecture stands in headers.
    Which definitions come together is by chance, as the emulator compiles those of its passes."""
    needs("nvrtc", "cuda.bindings.nvrtc")
    if arch == "sm_90":  # H100 and H200, which have fast ways to one another's memory
        kernels = [*covering(kernels, rng), *of_parts(kernels)]
    else:
        files = {stem: [k for k in kernels if k[0] == stem] for stem, _ in kernels}
        files = {stem: of for stem, of in files.items() if not stem.endswith("wgmma")}
        kernels = [of[rng.integers(len(of))] for of in files.values()]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # nothing comes from an earlier run
    with ThreadPoolExecutor(2) as pool:
        code = pool.map(lambda k: compile.cubin(k[0], arch, dict(k[1])), kernels)
        assert all(c[:4] == b"\x7fELF" for c in code)
