"""Writes a file of Qwen3.5-35B-A3B's shape (20 GB) with random weights, to be timed and compared.

usage: python benchmarks/large_file.py OUT.gguf [--layers 40] [--experts 256] [--vocab 248320]

Formats are those that llama-quantize gives it as Q4_K_M. Blocks are random, their scales such that
activations stay near 1; a few megabytes of them make all tensors, each from a place of its own.
"""

import argparse
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.helpers.synth import Geometry, _add, _random, _small_vocabulary

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 2048, 16, 2, 256
KEY_HEADS, VALUE_HEADS, STATE, TAPS = 16, 32, 128, 4
FFN, SHARED, USED = 512, 512, 8
POOL = 1 << 23
"""Weights of each format and spread that are drawn."""


def keys(a):
    """Hyper-parameters, and a vocabulary most of which is not used."""
    found = {
        "block_count": a.layers,
        "context_length": 262144,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e7,
        "rope.dimension_count": 64,
        "rope.dimension_sections": [11, 11, 10, 0],
        "expert_count": a.experts,
        "expert_used_count": USED,
        "expert_feed_forward_length": FFN,
        "expert_shared_feed_forward_length": SHARED,
        "ssm.conv_kernel": TAPS,
        "ssm.state_size": STATE,
        "ssm.group_count": KEY_HEADS,
        "ssm.time_step_rank": VALUE_HEADS,
        "ssm.inner_size": VALUE_HEADS * STATE,
        "full_attention_interval": 4,
    }
    text = _small_vocabulary(Geometry(vocab=900))
    text["tokenizer.ggml.tokens"] += [f"[{i}]" for i in range(900, a.vocab)]
    text["tokenizer.ggml.token_type"] += [5] * (a.vocab - 900)
    text["tokenizer.ggml.pre"] = "qwen35"
    return {f"qwen35moe.{k}": v for k, v in found.items()} | text


def tensors(a, rng):
    """Name, format, shape and spread of each matrix, or a name and the values themselves."""

    def about(mean, spread, *shape):
        return (mean + spread * rng.standard_normal(shape)).astype(np.float32)

    def matrix(name, fmt, *shape, spread=1.0):
        return name, fmt, shape, spread * shape[-1] ** -0.5

    q, kv, v = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, VALUE_HEADS * STATE
    channels = 2 * KEY_HEADS * STATE + v
    yield "token_embd.weight", "Q4_K", (a.vocab, HIDDEN), 1.0
    for i in range(a.layers):
        at, eighth = f"blk.{i}.", a.layers // 8
        more = i < eighth or i >= 7 * eighth or (i - eighth) % 3 == 2
        high = "Q6_K" if more else "Q4_K"
        for norm in ("attn_norm", "post_attention_norm"):
            yield f"{at}{norm}.weight", about(1, 0.1, HIDDEN)
        if (i + 1) % 4:
            yield matrix(f"{at}attn_qkv.weight", "Q6_K", channels, HIDDEN)
            yield matrix(f"{at}attn_gate.weight", "Q4_K", v, HIDDEN)
            yield matrix(f"{at}ssm_alpha.weight", "Q4_K", VALUE_HEADS, HIDDEN)
            yield matrix(f"{at}ssm_beta.weight", "Q4_K", VALUE_HEADS, HIDDEN)
            yield f"{at}ssm_conv1d.weight", about(0, 0.5, channels, TAPS)
            yield f"{at}ssm_dt.bias", about(0, 1, VALUE_HEADS)
            yield f"{at}ssm_a", -np.exp(about(0, 1, VALUE_HEADS))
            yield f"{at}ssm_norm.weight", about(1, 0.1, STATE)
            yield matrix(f"{at}ssm_out.weight", "Q4_K", HIDDEN, v)
        else:
            yield matrix(f"{at}attn_q.weight", "Q4_K", 2 * q, HIDDEN)
            yield matrix(f"{at}attn_k.weight", "Q4_K", kv, HIDDEN)
            yield matrix(f"{at}attn_v.weight", high, kv, HIDDEN)
            yield f"{at}attn_q_norm.weight", about(1, 0.1, HEAD_DIM)
            yield f"{at}attn_k_norm.weight", about(1, 0.1, HEAD_DIM)
            yield matrix(f"{at}attn_output.weight", "Q4_K", HIDDEN, q)
        yield f"{at}ffn_gate_inp.weight", about(0, 2 * HIDDEN**-0.5, a.experts, HIDDEN)
        yield f"{at}ffn_gate_inp_shexp.weight", about(0, HIDDEN**-0.5, HIDDEN)
        for end, stack, width in (("_exps", (a.experts,), FFN), ("_shexp", (), SHARED)):
            yield matrix(f"{at}ffn_gate{end}.weight", "Q4_K", *stack, width, HIDDEN)
            yield matrix(f"{at}ffn_up{end}.weight", "Q4_K", *stack, width, HIDDEN)
            yield matrix(f"{at}ffn_down{end}.weight", high, *stack, HIDDEN, width, spread=2)
    yield "output_norm.weight", about(1, 0.1, HIDDEN)
    yield matrix("output.weight", "Q6_K", a.vocab, HIDDEN)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out")
    p.add_argument("--layers", type=int, default=40)
    p.add_argument("--experts", type=int, default=256)
    p.add_argument("--vocab", type=int, default=248320)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args()
    rng = np.random.default_rng(a.seed)
    writer = gguf.GGUFWriter(a.out, "qwen35moe")
    for key, value in keys(a).items():
        _add(writer, key, value)
    pools, jobs, at = {}, [], 0
    for name, *what in tensors(a, rng):
        if len(what) == 1:
            data = np.frombuffer(what[0].tobytes(), np.uint8)
            writer.add_tensor_info(name, what[0].shape, np.dtype(np.float32), data.size)
            pieces = [(at, data)]
            size = data.size
        else:
            fmt, shape, spread = what
            if (fmt, spread) not in pools:
                pools[fmt, spread] = _random(rng, fmt, (POOL // 256, 256), spread)
            pool, kind = pools[fmt, spread], gguf.GGMLQuantizationType[fmt]
            row = (*shape[:-1], shape[-1] // 256 * pool.shape[1])
            size = math.prod(row)
            writer.add_tensor_info(name, row, np.dtype(np.uint8), size, raw_dtype=kind)
            pieces, first, done = [], int(rng.integers(len(pool) // 2)), 0
            while done < size:
                data = pool[first:].reshape(-1)[: size - done]
                pieces.append((at + done, data))
                done, first = done + data.size, 0
        jobs += pieces
        at += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    begin = -(-Path(a.out).stat().st_size // 32) * 32
    with Path(a.out).open("r+b") as file, ThreadPoolExecutor(os.cpu_count()) as threads:
        file.truncate(begin + at)
        for _ in threads.map(lambda job: os.pwrite(file.fileno(), job[1], begin + job[0]), jobs):
            pass
    print(f"{a.out}: {(begin + at) / 1e9:.1f} GB")


main()
