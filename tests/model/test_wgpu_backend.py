"""Whole passes of the wgpu backend against the reference: every stage, every logit, bit for bit."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest

from isobit.backends import open_backend
from isobit.backends.base import Batch, Wanted
from isobit.backends.base.batch import field_values
from isobit.backends.reference import ReferenceBackend
from isobit.backends.wgpu import WgpuBackend, fusions
from isobit.backends.wgpu.device import memory, selftest
from isobit.backends.wgpu.device.gpu import DEFAULT_SIZES, Device, Step, adapters
from isobit.backends.wgpu.lowering import Pass
from isobit.cli import main
from isobit.config import EngineConfig
from isobit.errors import BackendUnavailable
from isobit.gguf.reader import GGUFFile
from isobit.model.stages import ON_REQUEST, all_stages
from isobit.model.weights import Weights
from isobit.numerics.ops import TOKENS, Add
from isobit.runtime.model import Model, sample_path
from isobit.verify.receipt import Receipt
from isobit.verify.trace_file import Trace
from tests.helpers.passes import i32, run, same_bits
from tests.helpers.synth import Q4_K_M, Geometry, all_in, write_model
from tests.ops.wgpu_support import open_device

PAGES = i32([[3, 0, 7], [1, 4, 2], [5, 6, 8]])


@pytest.fixture
def device():
    return open_device()


@pytest.fixture(scope="module")
def sample():
    with GGUFFile.open(sample_path()) as file:
        yield Weights.from_file(file)


def opened(tmp_path, geometry, formats):
    """Weights of a new model of random blocks; the mapping lives as long as they do."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"model seed {seed}")
    file = GGUFFile.open(write_model(tmp_path / "model.gguf", geometry, formats, seed=seed))
    return Weights.from_file(file)


def ragged(rng, vocab, parts, pages=PAGES):
    """A batch of (first position, tokens) for each sequence; some logits, in no order."""
    lengths = [n for _, n in parts]
    total = sum(lengths)
    return Batch(
        tokens=i32(rng.integers(0, vocab, total)),
        positions=i32(np.concatenate([np.arange(p, p + n) for p, n in parts])),
        sequence=i32(np.repeat(np.arange(len(parts)), lengths)),
        pages=pages,
        logit_rows=i32([total - 1, 0, total // 2, *(np.cumsum(lengths) - 1)]),
    )


def traced(backend, batch):
    found = {}

    def tap(stage, layer, value):
        assert (stage, layer) not in found
        found[stage, layer] = np.array(value)

    return backend.forward(batch, tap), found


def check(ours, theirs, batch, *, moe=True):
    logits, stages = traced(ours, batch)
    expected_logits, expected = traced(theirs, batch)
    assert list(stages) == list(expected)
    assert {s for s, _ in stages} == set(all_stages(moe=moe)) - ON_REQUEST
    for key, value in stages.items():
        other = np.ascontiguousarray(expected[key])
        assert (value.shape, value.dtype) == (other.shape, other.dtype), key
        assert np.array_equal(value.view(np.uint32), other.view(np.uint32)), key
    assert same_bits(logits, expected_logits)
    plain = ours.forward(batch)  # without a tap; the cache holds the same values again
    assert same_bits(plain, logits)


@pytest.mark.parametrize("planes", [1, 2])
def test_the_sample_in_chunks(device, rng, sample, planes):
    ids = rng.integers(0, sample.config.vocab, 9).tolist()
    engine = EngineConfig(activation_bits=8 * planes, context=64, max_sequences=1)
    expected = run(ReferenceBackend(sample, engine), ids)
    ours = WgpuBackend(sample, engine, device)
    for chunk in (1, 7, None):
        assert same_bits(run(ours, ids, chunk=chunk), expected), f"chunk {chunk}"


def test_every_stage_of_the_sample(device, rng, sample):
    engine = EngineConfig(context=128, max_sequences=1)
    ours, theirs = WgpuBackend(sample, engine, device), ReferenceBackend(sample, engine)
    check(ours, theirs, ragged(rng, sample.config.vocab, [(0, 5)], PAGES[:1, :1] * 0))


LONG = {  # first position and tokens of each sequence
    "Q4_K_M": [(0, 3), (0, 66), (0, 1)],
    "Q8_0, ragged": [(0, 130), (0, 1), (0, 3)],
}
SMALL = 200_000  # bytes of a buffer
MODELS = {
    "Q4_K_M": (Geometry(), Q4_K_M),
    "Q8_0, ragged": (
        Geometry(hidden=96, heads=3, kv_heads=1, head_dim=32, ffn=160),
        all_in("Q8_0"),
    ),
    "dense Q5_K, tied": (Geometry(experts=0, tied=True), all_in("Q5_K")),
    "Q3_K, F16 ends": (
        Geometry(experts=5, experts_used=3, layers=1),
        {"": "Q3_K", "ffn_gate_inp": "F16", "token_embd": "F16", "output": "F16"},
    ),
    "gate and up of two formats": (
        Geometry(layers=1, head_dim=10, heads=4, kv_heads=4),
        {"": "Q2_K", "ffn_up": "Q4_0", "attn_k": "Q5_1", "attn_output": "BF16"}
        | {"ffn_gate_inp": "F32"},
    ),
    "IQ4_XS, IQ4_NL, MXFP4": (
        Geometry(layers=1),
        {"": "IQ4_XS", "ffn_gate": "MXFP4", "ffn_up": "MXFP4", "ffn_down": "IQ4_NL"}
        | {"ffn_gate_inp": "F32"},
    ),
    "IQ2_S, IQ3_XXS, IQ1_M, Q1_0": (
        Geometry(layers=1, ffn=256),
        {"": "IQ2_S", "ffn_gate": "IQ3_XXS", "ffn_up": "IQ1_M", "ffn_down": "IQ1_S"}
        | {"ffn_gate_inp": "F32", "attn_v": "Q1_0", "attn_q": "TQ2_0"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("small", [False, True], ids=["default limit", "small limit"])
def test_ragged_batches(device, rng, tmp_path, name, small, monkeypatch):
    """Three sequences on scattered pages; then one more token of each, then of one alone. With a
    small limit every buffer is divided and a batch takes several passes."""
    geometry, formats = MODELS[name]
    weights = opened(tmp_path, geometry, formats)
    engine = EngineConfig(context=192, max_sequences=3, chunk=16 if small else 512)
    if small:
        monkeypatch.setattr(device, "binding_bytes", SMALL)
        monkeypatch.setattr(memory, "_PARTIAL_BYTES", 40_000)
    ours, theirs = WgpuBackend(weights, engine, device), ReferenceBackend(weights, engine)
    moe, vocab = geometry.experts > 0, weights.config.vocab
    few = [(0, 7), (0, 1), (0, 13)]
    parts = few if small else LONG.get(name, few)
    check(ours, theirs, ragged(rng, vocab, parts), moe=moe)
    after = [(n, 1) for _, n in parts]
    check(ours, theirs, ragged(rng, vocab, after), moe=moe)
    check(ours, theirs, ragged(rng, vocab, [(parts[0][1] + 1, 1)]), moe=moe)


def test_small_limits_divide_everything(device, tmp_path, monkeypatch):
    """What the small limit of test_ragged_batches is for."""
    monkeypatch.setattr(device, "binding_bytes", SMALL)
    engine = EngineConfig(context=192, max_sequences=3)
    ours = WgpuBackend(opened(tmp_path, *MODELS["Q4_K_M"]), engine, device)
    assert [len(cache.parts) for cache in ours._g.caches.values()] == [2] * 4  # keys and values
    assert ours._plan.rows[TOKENS] == 48
    divided = {m.weights[0].name: len(m.segments[0].parts) for m in ours._g.matrices}
    assert divided["blk.0.ffn_gate_exps.weight"] > 1


def refusing(monkeypatch, refused):
    """Fusions that do not claim what begins with a refused operation."""

    def wrapped(claim):
        return lambda g, ops: 0 if refused(ops[0]) else claim(g, ops)

    monkeypatch.setattr(fusions, "CLAIMS", tuple(map(wrapped, fusions.CLAIMS)))


@pytest.mark.parametrize("name", ["Q4_K_M", "dense Q5_K, tied"])
@pytest.mark.parametrize("unfused", ["0", "1", "2", "01", "02", "12", "012"])
def test_layers_op_by_op_beside_fused_ones(device, rng, tmp_path, name, unfused, monkeypatch):
    """In each order, the same bits of every stage."""
    geometry, formats = MODELS[name]
    weights = opened(tmp_path, replace(geometry, layers=3), formats)
    engine = EngineConfig(context=192, max_sequences=3)
    refusing(monkeypatch, lambda op: str(op.layer) in unfused)
    ours, theirs = WgpuBackend(weights, engine, device), ReferenceBackend(weights, engine)
    batch = ragged(rng, weights.config.vocab, [(0, 4), (0, 1), (0, 2)])
    check(ours, theirs, batch, moe=geometry.experts > 0)
    check(ours, theirs, ragged(rng, weights.config.vocab, [(4, 1)]), moe=geometry.experts > 0)


def test_fusions_that_are_refused_here_and_there(device, rng, tmp_path, monkeypatch):
    """Any launch beside any other."""
    weights = opened(tmp_path, Geometry(layers=4), Q4_K_M)
    engine = EngineConfig(context=192, max_sequences=3)
    theirs = ReferenceBackend(weights, engine)
    refusing(monkeypatch, lambda _: rng.random() < 0.3)
    for _ in range(4):
        ours = WgpuBackend(weights, engine, device)
        check(ours, theirs, ragged(rng, weights.config.vocab, [(0, 3), (0, 1), (0, 2)]))


FUSED = (
    *("rms_norm", "matmul", "matmul", "head_vectors", "attention", "attention_merge", "matmul"),
    *("rms_norm", "matmul_floats", "top_k", "matmul", "gate", "matmul"),
)
ALONE = (
    *("rms_norm", "matmul", "matmul", "copy", "rms_norm", "rope", "copy", "rms_norm", "rope"),
    *("append", "append", "append", "attention", "attention_merge", "matmul"),
    *("add_rows", "rms_norm", "matmul_floats", "top_k"),
    *("matmul", "matmul", "gate", "matmul", "combine", "add_rows"),
)


@pytest.mark.parametrize(("claims", "expected"), [(fusions.CLAIMS, FUSED), ((), ALONE)])
def test_launches_of_a_layer(device, tmp_path, claims, expected, monkeypatch):
    """Nothing is quantised, copied or written twice that one launch left for the next."""
    monkeypatch.setattr(fusions, "CLAIMS", claims)
    weights = opened(tmp_path, Geometry(layers=1), Q4_K_M)
    ours = WgpuBackend(weights, EngineConfig(context=64, max_sequences=1), device)
    steps = ours._graph.steps(Pass(1, 1, 1, count=1), traced=False)
    names = [s.kernel.name.split(".")[-1] for s in steps if isinstance(s, Step)]
    assert names == list(expected) + ["rms_norm"] * (not claims)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_operation_without_a_kernel_is_refused_by_name(device, tmp_path, layer):
    @dataclass(frozen=True)
    class Sink(Add):
        kind = "add_with_sink"

    weights = opened(tmp_path, Geometry(layers=2), Q4_K_M)
    ops = tuple(
        replace(op, operation=Sink()) if op.kind == "add" and op.layer == layer else op
        for op in weights.graph.ops
    )
    changed = Weights(weights.config, replace(weights.graph, ops=ops))
    with pytest.raises(BackendUnavailable) as refusal:
        WgpuBackend(changed, EngineConfig(context=64), device)
    expected = f"wgpu: add_with_sink of layer {layer}: no kernel; another backend may run it"
    assert str(refusal.value) == expected


def test_decode_steps_of_one_shape(device, rng, tmp_path):
    """Passes recorded once and encoded ahead, across a tile's end and other passes in between."""
    weights = opened(tmp_path, Geometry(layers=1), Q4_K_M)
    engine = EngineConfig(context=128, max_sequences=1)
    ours, theirs = WgpuBackend(weights, engine, device), ReferenceBackend(weights, engine)
    ids = rng.integers(0, weights.config.vocab, 70).tolist()
    expected = run(theirs, ids)
    assert same_bits(run(ours, ids[:60]), expected[:60])
    for i in range(60, 70):
        assert same_bits(run(ours, ids[i : i + 1], start=i), expected[i : i + 1]), i
        if i == 62:
            assert same_bits(run(ours, ids[50:62], start=50), expected[50:62])


def test_a_token_is_one_submission_of_what_is_compiled(device, tmp_path, monkeypatch):
    """Nothing is recorded again before the number of tiles passes a power of two."""
    weights = opened(tmp_path, Geometry(layers=2), Q4_K_M)
    ours = WgpuBackend(weights, EngineConfig(context=256, max_sequences=1), device)
    run(ours, [1] * 188)
    run(ours, [4], start=188)
    submitted = []
    submit = device.submit
    monkeypatch.setattr(device, "submit", lambda c: (submitted.append(c), submit(c)))
    monkeypatch.setattr(device, "kernel", lambda *_, **__: pytest.fail("a kernel is compiled"))
    monkeypatch.setattr(device, "record", lambda _: pytest.fail("a pass of this shape is recorded"))
    for i in range(189, 195):
        run(ours, [5], start=i)
    assert len(submitted) == 6


def test_stages_are_chosen(device, rng, tmp_path):
    weights = opened(tmp_path, Geometry(layers=1), Q4_K_M)
    ours = WgpuBackend(weights, EngineConfig(context=64, max_sequences=1), device)
    seen = []
    batch = ragged(rng, 300, [(0, 3)], PAGES[:1, :1] * 0)
    wanted = frozenset({"attention", "lm_head"})
    logits = ours.forward(batch, lambda stage, layer, _: seen.append((stage, layer)), wanted)
    assert seen == [("attention", 0), ("lm_head", None)]
    assert same_bits(logits, ours.forward(batch))


def test_a_receipts_digests_and_experts_are_made_there(device, rng, tmp_path, monkeypatch):
    """In the passes themselves, of which a prompt takes several: logits do not come to the host."""
    weights = opened(tmp_path, Geometry(layers=2), Q4_K_M)
    engine = EngineConfig(context=192, max_sequences=3, chunk=8)
    ours, theirs = WgpuBackend(weights, engine, device), ReferenceBackend(weights, engine)
    monkeypatch.setattr(ours, "_logits_of", lambda *_: pytest.fail("logits come to the host"))
    prompts, step = [(0, 13), (0, 2), (0, 6)], [(13, 1), (2, 1), (6, 1)]
    for parts in (prompts, step, [(14, 1)]):  # the last twice
        batch = ragged(rng, 300, parts)
        for wanted in (Wanted(False, True, digests=True, routes=True), Wanted(False, routes=True)):
            found, expected = ours.run(batch, wanted), theirs.run(batch, wanted)
            assert found.finite.all()
            for name, value in field_values(expected).items():
                got = field_values(found)[name]
                assert np.array_equal(got, value) if value is not None else got is None, name
    prefix = replace(batch, logit_rows=i32([]))  # a part of a prompt
    routes = Wanted(False, routes=True)
    assert np.array_equal(ours.run(prefix, routes).routes, theirs.run(prefix, routes).routes)
    ours.close()
    theirs.close()


def test_the_default_limits_are_enough(rng, sample):
    """On a device that was asked for no more: what exceeds a limit is an error there."""
    open_device()
    device = Device(adapters()[0], DEFAULT_SIZES)
    assert device.binding_bytes == 128 << 20
    limits = device._device.limits
    assert limits["max-buffer-size"] == 256 << 20
    assert limits["max-storage-buffers-per-shader-stage"] == 8
    assert limits["max-compute-workgroup-storage-size"] == 16384
    ids = rng.integers(0, sample.config.vocab, 9).tolist()
    engine = EngineConfig(context=128, max_sequences=1)
    ours = WgpuBackend(sample, engine, device)
    assert same_bits(run(ours, ids), run(ReferenceBackend(sample, engine), ids))
    assert same_bits(run(ours, ids[:1]), run(ReferenceBackend(sample, engine), ids[:1]))
    device.close()


def test_a_lost_device_and_another_load(device, rng, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        selftest, "run", lambda device, run=selftest.run: run(device, cases=1 << 12)
    )
    weights = opened(tmp_path, Geometry(layers=1, experts=0), all_in("Q8_0"))
    engine = EngineConfig(context=64, max_sequences=1)
    batch = ragged(rng, 300, [(0, 3)], PAGES[:1, :1] * 0)
    logits = WgpuBackend(weights, engine, device).forward(batch)
    first = open_backend("wgpu", weights, engine)
    assert "INEXACT" not in first.device
    first.close()
    with pytest.raises(BackendUnavailable, match="lost; load the model again"):
        first.forward(batch)
    again = open_backend("wgpu", weights, engine)
    assert same_bits(again.forward(batch), logits)
    # Lost while a pass is on its way.
    submit = again._device.submit
    monkeypatch.setattr(again._device, "submit", lambda c: (submit(c), again.close()))
    with pytest.raises(BackendUnavailable, match="lost; load the model again"):
        again.forward(batch)


def test_an_inexact_driver_runs_only_when_it_is_allowed(tmp_path, monkeypatch):
    open_device()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        selftest, "run", lambda _: [selftest.Finding("root", 9, 2, "of 2: expected 3")]
    )
    weights = opened(tmp_path, Geometry(layers=1, experts=0), all_in("Q8_0"))
    with pytest.raises(BackendUnavailable, match="root: 2 of 9 cases differ, the first: of 2"):
        open_backend("wgpu", weights, EngineConfig(context=64))
    engine = EngineConfig(context=64, max_sequences=1, allow_inexact=True)
    backend = open_backend("wgpu", weights, engine)
    assert backend.inexact == ("root",)
    assert backend.device.endswith("INEXACT: root")
    backend.close()


def test_what_an_inexact_device_gives_says_so(tmp_path, monkeypatch, capsys):
    open_device()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selftest, "run", lambda _: [selftest.Finding("root", 9, 2, "of 2")])
    argv = ["run", "--backend", "wgpu", "--tokens", "5,6", "-n", "1", "-c", "64", "--json"]
    assert main(argv) == 4
    assert "--allow-inexact" in capsys.readouterr().err
    assert main([*argv, "--allow-inexact", "--receipt", "r.json"]) == 0
    out, err = capsys.readouterr()
    assert "INEXACT: root" in json.loads(out)["device"]
    assert "INEXACT: root" in err.splitlines()[0]
    assert "INEXACT: root" in Receipt.load("r.json").device
    argv = ["trace", "--backend", "wgpu", "--tokens", "5,6", "-o", "t", "--stages", "lm_head"]
    assert main([*argv, "--allow-inexact"]) == 0
    assert "INEXACT: root" in Trace.load("t").manifest.device


# What auto chooses.


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr("isobit.backends.may_have_gpu", lambda: True)
    monkeypatch.setattr("isobit.backends.cuda.available", lambda: (False, "cuda: none"))


def chosen(tmp_path, **engine):
    weights = opened(tmp_path, Geometry(layers=1, experts=0), all_in("Q8_0"))
    notes = []
    engine = EngineConfig(context=64, max_sequences=1, **engine)
    backend = open_backend("auto", weights, engine, notes.append)
    backend.close()
    return backend.name, notes


def test_auto_takes_no_software_device(tmp_path, no_cuda):
    open_device()
    if adapters()[0].info["adapter_type"] != "CPU":
        pytest.skip("not run: the device is no software device")
    name, (note,) = chosen(tmp_path)
    assert name == "cpu"
    assert note.startswith("backend auto: using cpu (cuda: none; wgpu: no GPU, only a software ")


def test_auto_takes_a_gpu_whose_driver_is_exact(tmp_path, monkeypatch, no_cuda):
    open_device()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("isobit.backends.wgpu.available", lambda **_: (True, ""))
    monkeypatch.setattr(selftest, "run", lambda _: [])
    assert chosen(tmp_path) == ("wgpu", ["backend auto: using wgpu (cuda: none)"])
    # One that is not exact, even if that is allowed where it is named.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr(selftest, "run", lambda _: [selftest.Finding("root", 9, 2, "of 2")])
    name, (note,) = chosen(tmp_path, allow_inexact=True)
    assert name == "cpu"
    assert "root: 2 of 9 cases differ" in note


def test_generation_is_the_cpu_backends(device, monkeypatch):
    """Through the library's front door: prefill, decode and sampling."""
    monkeypatch.setattr("isobit.backends.wgpu.backend.open_device", lambda: device)
    monkeypatch.setattr(device, "close", lambda: None)
    monkeypatch.setattr("isobit.backends.wgpu.device.driver.require_exact", lambda *_, **__: ())
    engine = EngineConfig(context=64, max_sequences=1)
    found = []
    for name in ("reference", "wgpu"):
        model = Model(sample_path(), name, engine)
        found.append(model.generate("def add(", max_tokens=4).token_ids)
        model.close()
    assert found[0] == found[1]


def test_every_command_is_submitted_once(device, monkeypatch):
    """One that is dropped keeps the memory of the whole model: those encoded ahead are not."""
    monkeypatch.setattr("isobit.backends.wgpu.backend.open_device", lambda: device)
    monkeypatch.setattr(device, "close", lambda: None)
    monkeypatch.setattr("isobit.backends.wgpu.device.driver.require_exact", lambda *_, **__: ())
    made, submitted = [], []
    encode, submit = device.encode, device.submit

    def encoding(*args):
        made.append(encode(*args))
        return made[-1]

    def submitting(command):
        submitted.append(command)
        submit(command)

    monkeypatch.setattr(device, "encode", encoding)
    monkeypatch.setattr(device, "submit", submitting)
    with Model(sample_path(), "wgpu", EngineConfig(context=256, max_sequences=2)) as model:
        first = model.generate("def add(", max_tokens=3).token_ids
        several = model.generate(["def add(", "import"], max_tokens=3)  # passes of other shapes
        assert several[0].token_ids == first
        device.forget()  # as recordings fall out of use
        assert model.generate("def add(", max_tokens=3).token_ids == first
        assert len(made) > len(submitted)
    assert sorted(map(id, made)) == sorted(map(id, submitted))
