"""inspect on files made for the purpose: what a token costs, and what would be refused."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from isobit.cli import main
from isobit.inspect import inspect

HIDDEN, FFN, HEADS, HEAD_DIM, VOCAB, EXPERTS, CHOSEN = 64, 32, 2, 32, 257, 4, 2


def write(
    path: Path,
    *,
    tied: bool = False,
    strange_type: bool = False,
    leave_out: str = "",
    scaling: str = "",
) -> Path:
    w = gguf.GGUFWriter(str(path), "qwen3moe")
    w.add_block_count(1)
    w.add_context_length(128)
    w.add_embedding_length(HIDDEN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(CHOSEN)
    w.add_expert_feed_forward_length(FFN)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(10000.0)
    w.add_float32("test.nan", float("nan"))
    if scaling:
        w.add_string("qwen3moe.rope.scaling.type", scaling)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_tokens = [chr(c) for c in (*printable, *range(0x100, 0x100 + 256 - len(printable)))]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list([*byte_tokens, "ab"])
    w.add_token_types([1] * VOCAB)
    w.add_token_merges(["a b"])

    def add(name: str, *shape: int) -> None:
        if name == leave_out:
            return
        if strange_type and name == "blk.0.attn_q.weight":
            blocks = np.zeros((shape[0], shape[1] // 32 * 18), np.uint8)
            w.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.IQ4_NL)
        else:
            w.add_tensor(name, np.zeros(shape, np.float32))

    add("token_embd.weight", VOCAB, HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", VOCAB, HIDDEN)
    for name, *shape in (
        ("attn_norm", HIDDEN),
        ("attn_q", HEADS * HEAD_DIM, HIDDEN),
        ("attn_k", HEAD_DIM, HIDDEN),
        ("attn_v", HEAD_DIM, HIDDEN),
        ("attn_q_norm", HEAD_DIM),
        ("attn_k_norm", HEAD_DIM),
        ("attn_output", HIDDEN, HEADS * HEAD_DIM),
        ("ffn_norm", HIDDEN),
        ("ffn_gate_inp", EXPERTS, HIDDEN),
        ("ffn_gate_exps", EXPERTS, FFN, HIDDEN),
        ("ffn_up_exps", EXPERTS, FFN, HIDDEN),
        ("ffn_down_exps", EXPERTS, HIDDEN, FFN),
    ):
        add(f"blk.0.{name}.weight", *shape)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_active_bytes_count_what_a_decode_step_reads(tmp_path: Path, tied: bool) -> None:
    found = inspect(write(tmp_path / "m.gguf", tied=tied))
    assert found.refused == []
    one_row, output = HIDDEN, VOCAB * HIDDEN
    attention = 2 * (HEADS * HEAD_DIM * HIDDEN) + 2 * (HEAD_DIM * HIDDEN) + 2 * HEAD_DIM
    experts = CHOSEN * 3 * FFN * HIDDEN
    norms = 3 * HIDDEN
    expected = one_row + output + attention + experts + norms + EXPERTS * HIDDEN
    assert found.active_bytes_per_token == 4 * expected
    assert found.kv_bytes_per_token == 2 * (2 * HEAD_DIM + 4)


def test_a_type_that_is_not_implemented_is_named(tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "m.gguf", strange_type=True))
    assert len(found.refused) == 1
    assert "blk.0.attn_q.weight" in found.refused[0]
    assert "IQ4_NL" in found.refused[0]
    assert found.active_bytes_per_token is None
    assert found.types[-1].type == "IQ4_NL"
    assert found.types[-1].nbytes is None


def test_a_missing_tensor_and_an_unknown_scaling_are_named(tmp_path: Path) -> None:
    found = inspect(write(tmp_path / "a.gguf", leave_out="blk.0.ffn_up_exps.weight"))
    assert len(found.refused) == 1
    assert "blk.0.ffn_up_exps.weight" in found.refused[0]
    found = inspect(write(tmp_path / "b.gguf", scaling="yarn"))
    assert len(found.refused) == 1
    assert "rope.scaling.type" in found.refused[0]


def test_json_of_a_file_with_odd_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "m.gguf", strange_type=True)
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["metadata"]["test.nan"] == "nan"
    assert {"name": "blk.0.attn_q.weight", "type": "IQ4_NL", "shape": [64, 64], "bytes": None} in (
        found["tensors"]
    )
    assert main(["inspect", str(path)]) == 0
    assert "not implemented" in capsys.readouterr().out
