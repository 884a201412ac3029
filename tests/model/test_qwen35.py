"""Qwen3.5-MoE: a trained sample file of other makers' tools, and Qwen3.5: random weights of odd
shapes; bit for bit on the backends, and against transformers' own models in float64."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import isobit
from isobit.backends import open_backend
from isobit.backends.base import Backend, Batch
from isobit.config import EngineConfig
from isobit.errors import ModelRefused, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.model.architectures import read_config
from isobit.model.weights import Weights
from isobit.verify.faults import ChangedStage, one_ulp, with_backend
from isobit.verify.oracle import Oracle
from isobit.verify.trace import ModelRun
from isobit.verify.verify import verify
from tests.helpers import random_models as make
from tests.helpers.expected import needs
from tests.helpers.passes import opened, run_cut
from tests.model.test_qwen3next import G, write
from tests.ops.wgpu_support import open_device

DATA = Path(__file__).parents[1] / "data"
SAMPLE = DATA / "pyhybrid-moe-34m-Q4_K_M.gguf"
PROMPT = "import os\n\ndef read(path):\n    with open(path) as f:\n"


@pytest.fixture(scope="module")
def file() -> Iterator[GGUFFile]:
    with GGUFFile.open(SAMPLE) as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(file: GGUFFile) -> list[int]:
    text = (DATA / "pyhybrid-heldout.txt").read_text()
    with isobit.load(SAMPLE, backend="cpu") as model:
        return model.tokenize(text)


def logits(
    backend: Backend, parts: list[list[int]], cuts: list[int], states: list[int] | None = None
) -> NDArray[np.float32]:
    """Logits of every token of sequences of one length, run together, cut into passes."""
    n, pages = len(parts[0]), len(parts[0]) // 64 + 1
    table = np.arange(len(parts) * pages, dtype=np.int32).reshape(len(parts), pages)
    out = np.empty((len(parts), n, 8192), np.float32)
    for first, last in zip(cuts, [*cuts[1:], n], strict=True):
        k = last - first
        batch = Batch(
            np.concatenate([p[first:last] for p in parts]).astype(np.int32),
            np.tile(np.arange(first, last, dtype=np.int32), len(parts)),
            np.repeat(np.arange(len(parts), dtype=np.int32), k),
            table,
            np.arange(len(parts) * k, dtype=np.int32),
            None if states is None else np.array(states, np.int32),
        )
        out[:, first:last] = backend.forward(batch).reshape(len(parts), k, -1)
    return out


def same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize(("name", "threads"), [("cpu", 1), ("cpu", 3), ("wgpu", 1)])
def test_backends_cuts_and_batches_agree(
    planes: int, name: str, threads: int, file: GGUFFile, ids: list[int]
) -> None:
    weights = Weights.from_file(file)
    engine = EngineConfig(activation_bits=8 * planes, threads=threads, context=128, max_sequences=3)
    n = 70 if name == "cpu" else 12  # a software device takes its time
    parts = [ids[:n], ids[100 : 100 + n]]
    backend = opened(name, weights, engine)
    together = logits(backend, parts, [0, 1, 2, 5, n // 2, n - 4])
    assert same(together, logits(backend, parts, [0, n - 6], states=[2, 0]))
    for part, expected in zip(parts, together, strict=True):
        assert same(logits(backend, [part], [0])[0], expected)
    backend.close()
    if threads == 1:
        reference = open_backend("reference", weights, engine)
        m = min(n, 40)
        assert same(logits(reference, [parts[0][:m]], [0, 3])[0], together[0, :m])


@pytest.mark.parametrize("name", ["cpu", "wgpu"])
def test_verify_knows_every_stage(name: str) -> None:
    if name == "wgpu":
        open_device()  # or "not run"
    with (
        isobit.load(SAMPLE, backend=name, context=64) as ours,
        isobit.load(SAMPLE, backend="reference", context=64) as theirs,
    ):
        tokens = ours.tokenize("import os\nx = 1\n")
        assert verify(ours, ModelRun(theirs), tokens).identical


def test_a_fault_in_the_delta_net_is_found_where_it_is() -> None:
    rng = np.random.default_rng(5)
    with isobit.load(SAMPLE, backend="reference", context=64) as clean:
        tokens = clean.tokenize("import os\nx = 1\n")
        for stage in ("delta_net", "delta_decay", "delta_conv", "attn_gated", "ffn_with_shared"):
            layer = 3 if stage == "attn_gated" else 1
            faulty = with_backend(
                clean, lambda w, e, s=stage, n=layer: ChangedStage(w, e, s, n, one_ulp(rng))
            )
            diff = verify(faulty, ModelRun(clean), tokens)
            assert diff.first is not None
            assert (diff.first.stage, diff.first.layer) == (stage, layer)
            assert diff.first.origin == "faulty"
            later = [d.origin for d in diff.stages if d is not diff.first]
            assert "faulty" not in later, stage


def test_a_generation_can_be_repeated() -> None:
    with isobit.load(SAMPLE, backend="cpu", context=256) as model:
        first = model.generate(PROMPT, max_tokens=40, temperature=0.8, seed=3)
        assert first.text == model.generate(PROMPT, max_tokens=40, temperature=0.8, seed=3).text
        answer = model.chat([{"role": "user", "content": "Hello!"}], max_tokens=30)
    assert answer.text == "Hello! How can I help you with Python?"


def test_a_lost_state_is_said() -> None:
    with isobit.load(SAMPLE, backend="cpu", context=256) as model, model.new_sequence() as sequence:
        model.prefill(sequence, [5, 6, 7])

        def stop(*_: object) -> None:
            raise KeyError("stop")

        with pytest.raises(KeyError):
            model.forward(sequence, [8], [0], stop, frozenset({"embedding"}))
        with pytest.raises(UsageError, match="a recurrent model cannot go back"):
            model.prefill(sequence, [8])


def test_perplexity_is_near_llama_cpps(file: GGUFFile, ids: list[int]) -> None:
    """llama.cpp's float32 file gives 5.0182 for these 512 tokens, its Q4_K_M 4.9659, both with
    8-bit or no activations; the exact value of the Q4_K_M weights lies between 4.90 and 4.97."""
    backend = open_backend("cpu", Weights.from_file(file), EngineConfig(context=512))
    z = logits(backend, [ids[:512]], [0])[0].astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    scored = [-log_p[i, ids[i + 1]] for i in range(256, 511)]
    assert 4.90 < np.exp(np.mean(scored)) < 4.97


def test_the_l2_norm_is_over_the_root_of_the_sum(file: GGUFFile, ids: list[int]) -> None:
    """With q and k a thousand times smaller, eps counts: the two forms of the norm part."""
    weights = Weights.from_file(file)
    changed = {}
    for name, w in weights.graph.weights.items():
        if name.endswith("ssm_conv1d.weight"):
            taps = w.float32().copy()
            taps[:512] *= np.float32(1e-3)
            changed[name] = type(w)(name, w.format, w.shape, taps.reshape(-1).view(np.uint8))
    graph = weights.graph.with_weights(changed)
    backend = open_backend("cpu", Weights(weights.config, graph), EngineConfig(context=512))
    z = logits(backend, [ids[:512]], [0])[0].astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    found = np.exp(np.mean([-log_p[i, ids[i + 1]] for i in range(256, 511)]))
    assert 5.9 < found < 6.2  # llama.cpp: 6.06; with x / max(length, eps) it is 4.93


def test_against_transformers_in_float64(file: GGUFFile, ids: list[int]) -> None:
    torch = needs("torch", "torch")
    transformers = needs("transformers", "transformers")
    config = transformers.Qwen3_5MoeTextConfig(
        vocab_size=8192,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=256,
        rms_norm_eps=float(np.float32(1e-6)),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=12,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        shared_expert_intermediate_size=256,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
        },
        partial_rotary_factor=0.25,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = transformers.Qwen3_5MoeForCausalLM(config).double()
    tensors = {k: v for k, v in _tensors(SAMPLE).items() if not k.startswith("blk.8.")}  # a draft
    state = _for_transformers(tensors, key_heads=2, value_heads=4, size=128)
    state = {k: torch.from_numpy(v) for k, v in state.items()}
    model.load_state_dict(state, strict=True)
    tokens = ids[:120]
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()
    found = Oracle.of(file).evaluate(tokens).logits
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
    ours = logits(
        open_backend("cpu", Weights.from_file(file), EngineConfig(context=128)), [tokens], [0]
    )[0]
    assert np.linalg.norm(ours - expected) < 2e-3 * np.linalg.norm(expected)


TOKENS = np.random.default_rng(4).integers(0, 300, 80).tolist()
write_dense = partial(write, g=replace(G, experts=0, experts_used=0, context=256), kind="qwen35")
"""Two delta nets of 2 key and 6 value heads around attention of 3 heads, one dense feed-forward
each."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GGUFFile]:
    path = tmp_path_factory.mktemp("qwen35") / "m.gguf"
    write_dense(path)
    with GGUFFile.open(path) as opened_:
        yield opened_


@pytest.mark.parametrize("planes", [1, 2])
def test_bits_of_the_dense_model(planes: int, dense: GGUFFile) -> None:
    weights = Weights.from_file(dense)
    engine = EngineConfig(activation_bits=8 * planes, context=128, max_sequences=1)
    expected = run_cut(opened("reference", weights, engine), TOKENS, [0])
    for name in ("cpu", "wgpu"):
        backend = opened(name, weights, engine)
        for cuts in ([0], [0, 1, 2, 31, 64, 65]):
            assert same(run_cut(backend, TOKENS, cuts), expected), (name, cuts)
        backend.close()


def test_the_dense_model_in_float64(dense: GGUFFile) -> None:
    torch = needs("torch", "torch")
    transformers = needs("transformers", "transformers")
    config = transformers.Qwen3_5TextConfig(
        vocab_size=300,
        hidden_size=160,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        rms_norm_eps=float(np.float32(1e-5)),
        max_position_embeddings=256,
        tie_word_embeddings=False,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        attn_implementation="eager",
    )
    model = transformers.Qwen3_5ForCausalLM(config).double()
    state = _for_transformers(_tensors(dense.path), key_heads=2, value_heads=6, size=32)
    model.load_state_dict({k: torch.from_numpy(v) for k, v in state.items()}, strict=True)
    make.check_accuracy(dense, TOKENS, make.logits_of(model, TOKENS), within=1e-4)


def _tensors(path: Path) -> dict[str, NDArray[np.float64]]:
    """A file's tensors, by the gguf package."""
    found = {}
    for t in gguf.GGUFReader(path).tensors:
        values = gguf.quants.dequantize(t.data, t.tensor_type)
        found[t.name] = np.array(values, np.float64).reshape(tuple(t.shape)[::-1])
    return found


def _for_transformers(
    found: dict[str, NDArray[np.float64]], key_heads: int, value_heads: int, size: int
) -> dict[str, NDArray[np.float64]]:
    """Tensors under transformers' names: value heads in groups of their key head, norms less one,
    the decay's logarithm."""
    # Where transformers' value head is in the file.
    group = np.arange(value_heads).reshape(-1, key_heads).T.reshape(-1)
    keys = 2 * key_heads * size
    layers = 1 + max(int(name.split(".")[1]) for name in found if name.startswith("blk."))

    def grouped(x: NDArray[np.float64], size: int, axis: int = 0) -> NDArray[np.float64]:
        rows = (group[:, None] * size + np.arange(size)).reshape(-1)
        return np.take(x, rows, axis=axis)

    out = {
        "model.embed_tokens.weight": found["token_embd.weight"],
        "model.norm.weight": found["output_norm.weight"] - 1,
        "lm_head.weight": found["output.weight"],
    }
    for i in range(layers):
        at, w = f"model.layers.{i}.", {k.removeprefix(f"blk.{i}."): v for k, v in found.items()}
        out[at + "input_layernorm.weight"] = w["attn_norm.weight"] - 1
        out[at + "post_attention_layernorm.weight"] = w["post_attention_norm.weight"] - 1
        if "ssm_a" in w:
            a = at + "linear_attn."
            qkv = w["attn_qkv.weight"]
            out[a + "in_proj_qkv.weight"] = np.concatenate([qkv[:keys], grouped(qkv[keys:], size)])
            out[a + "in_proj_z.weight"] = grouped(w["attn_gate.weight"], size)
            out[a + "in_proj_b.weight"] = grouped(w["ssm_beta.weight"], 1)
            out[a + "in_proj_a.weight"] = grouped(w["ssm_alpha.weight"], 1)
            taps = w["ssm_conv1d.weight"]
            taps = np.concatenate([taps[:keys], grouped(taps[keys:], size)])
            out[a + "conv1d.weight"] = taps[:, None]
            out[a + "dt_bias"] = grouped(w["ssm_dt.bias"], 1)
            out[a + "A_log"] = np.log(-grouped(w["ssm_a"], 1))
            out[a + "norm.weight"] = w["ssm_norm.weight"]
            out[a + "out_proj.weight"] = grouped(w["ssm_out.weight"], size, axis=1)
        else:
            a = at + "self_attn."
            for name, role in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v")):
                out[f"{a}{name}_proj.weight"] = w[f"{role}.weight"]
            out[a + "o_proj.weight"] = w["attn_output.weight"]
            out[a + "q_norm.weight"] = w["attn_q_norm.weight"] - 1
            out[a + "k_norm.weight"] = w["attn_k_norm.weight"] - 1
        m = at + "mlp."
        if "ffn_gate.weight" in w:
            for role in ("gate", "up", "down"):
                out[f"{m}{role}_proj.weight"] = w[f"ffn_{role}.weight"]
            continue
        out[m + "gate.weight"] = w["ffn_gate_inp.weight"]
        both = np.concatenate([w["ffn_gate_exps.weight"], w["ffn_up_exps.weight"]], axis=1)
        out[m + "experts.gate_up_proj"] = both
        out[m + "experts.down_proj"] = w["ffn_down_exps.weight"]
        for role in ("gate", "up", "down"):
            out[f"{m}shared_expert.{role}_proj.weight"] = w[f"ffn_{role}_shexp.weight"]
        out[m + "shared_expert_gate.weight"] = w["ffn_gate_inp_shexp.weight"].reshape(1, -1)
    return out


def test_what_a_file_lacks_is_refused_by_one_line(tmp_path: Path, file: GGUFFile) -> None:
    arch = "qwen35moe"
    for key, said in (
        ("rope.dimension_count", "rope.dimension_count: expected an integer"),
        ("ssm.state_size", "ssm.state_size: expected an integer"),
        ("rope.freq_base", "rope.freq_base: expected a number"),
    ):
        metadata = {k: v for k, v in file.metadata.items() if k != f"{arch}.{key}"}
        with pytest.raises(ModelRefused, match=said):
            read_config(metadata, vocab=8192, source="m.gguf")
    for key, value in (
        ("attention.recurrent_layers", [True, False]),
        ("ssm.inner_size", 513),
        ("ssm.group_count", 5),
        ("rope.scaling.type", "yarn"),
    ):
        with pytest.raises(ModelRefused, match=key):
            read_config(file.metadata | {f"{arch}.{key}": value}, vocab=8192, source="m.gguf")
