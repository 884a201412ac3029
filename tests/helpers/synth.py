"""Writes small Qwen3 and Qwen3-MoE models of any geometry as GGUF: random weights, valid blocks.

The file is written by the ``gguf`` package, so that no code under test takes part in it. Quantised
blocks are random bytes whose scales are set for weights of the wanted spread; they reach every
code, sub-scale and sign that a format has, which trained weights do not.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from isobit.config import ModelConfig
from isobit.gguf.reader import GGUFFile
from tests.helpers.blocks import FIELDS, UNIT, set_d, set_dmin

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Geometry:
    """The shape of a model; ``experts=0`` is the dense architecture."""

    layers: int = 2
    hidden: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 8
    experts_used: int = 2
    ffn: int = 256
    vocab: int = 320
    context: int = 512
    rope_base: float = 1e6
    tied: bool = False

    @classmethod
    def of(cls, c: ModelConfig, layers: int, context: int) -> "Geometry":
        """A model's, but for its vocabulary, with fewer layers."""
        return cls(
            *(layers, c.hidden, c.n_heads, c.n_kv_heads, c.head_dim),
            *(c.n_experts, c.n_experts_used, c.ffn),
            context=context,
            rope_base=c.rope_base,
        )

    @property
    def arch(self) -> str:
        return "qwen3moe" if self.experts else "qwen3"


Q4_K_M = {"": "Q4_K", "attn_v": "Q6_K", "ffn_down": "Q6_K", "output": "Q6_K", "ffn_gate_inp": "F32"}
"""Formats by role, as the usual mixture has them; "" is every role not named. Norms are F32."""


def all_in(fmt: str, router: str = "F32") -> dict[str, str]:
    """Every matrix in one format, except the router."""
    return {"": fmt, "ffn_gate_inp": router}


def write_model(
    path: Path,
    geometry: Geometry | None = None,
    formats: Mapping[str, str] = Q4_K_M,
    *,
    seed: int = 0,
    metadata: Mapping[str, object] | None = None,
    without: Collection[str] = (),
    reshaped: Mapping[str, tuple[int, ...]] | None = None,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    arch: str | None = None,
    vocabulary: Path | None = None,
    fused: bool = False,
) -> Path:
    """Write a model and return its path.

    formats: role (``attn_q``, ``ffn_down``, ...) to format name. metadata: keys to add or replace
    (None removes one). without: tensors to leave out; reshaped: tensors to give another shape;
    extra: tensors to add; arch: what the file calls its architecture. vocabulary: a GGUF file to
    take the tokenizer from; else a small one of ``geometry.vocab``. fused: the same weights of
    attn_q, attn_k and attn_v as one tensor attn_qkv, which takes one format.
    """
    g = geometry or Geometry()
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch or g.arch)
    keys = _hyper_parameters(g) | (_copied(vocabulary) if vocabulary else _small_vocabulary(g))
    vocab = len(keys["tokenizer.ggml.tokens"])  # type: ignore[arg-type]
    for key, value in (keys | dict(metadata or {})).items():
        if value is not None and key != "general.architecture":
            _add(writer, key, value)
    held: list[NDArray[np.generic]] = []
    added = {name: (shape, 1.0) for name, shape in (extra or {}).items()}
    for name, (usual, spread) in (_tensors(g, vocab) | added).items():
        if name in without:
            continue
        shape = (reshaped or {}).get(name, usual)
        role = name.removesuffix(".weight").split(".")[-1]
        fmt = "F32" if len(shape) == 1 else formats.get(role.removesuffix("_exps"), formats[""])
        if len(shape) == 1:
            writer.add_tensor(name, (1 + 0.1 * rng.standard_normal(shape)).astype(np.float32))
        else:
            values = _random(rng, fmt, shape, spread)
            if fused and role in ("attn_q", "attn_k", "attn_v"):
                held.append(values)
                if role != "attn_v":
                    continue
                writer.add_tensor(
                    name.replace(role, "attn_qkv"), np.concatenate(held), raw_dtype=Type[fmt]
                )
                held.clear()
                continue
            writer.add_tensor(name, values, raw_dtype=Type[fmt])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(g: Geometry, vocab: int) -> dict[str, tuple[tuple[int, ...], float]]:
    """Each tensor's shape and the standard deviation of its values."""
    h, f, stack = g.hidden, g.ffn, (g.experts,) if g.experts else ()
    q, kv, tail = g.heads * g.head_dim, g.kv_heads * g.head_dim, "_exps" if g.experts else ""
    out: dict[str, tuple[tuple[int, ...], float]] = {"token_embd": ((vocab, h), 1.0)}
    for i in range(g.layers):
        layer: dict[str, tuple[tuple[int, ...], float]] = {
            "attn_norm": ((h,), 0),
            "attn_q": ((q, h), h**-0.5),
            "attn_k": ((kv, h), h**-0.5),
            "attn_v": ((kv, h), h**-0.5),
            "attn_q_norm": ((g.head_dim,), 0),
            "attn_k_norm": ((g.head_dim,), 0),
            "attn_output": ((h, q), q**-0.5),
            "ffn_norm": ((h,), 0),
            "ffn_gate" + tail: ((*stack, f, h), h**-0.5),
            "ffn_up" + tail: ((*stack, f, h), h**-0.5),
            "ffn_down" + tail: ((*stack, h, f), 2 * f**-0.5),
        }
        if g.experts:
            layer["ffn_gate_inp"] = ((g.experts, h), 2 * h**-0.5)
        out |= {f"blk.{i}.{role}": value for role, value in layer.items()}
    out["output_norm"] = ((h,), 0)
    if not g.tied:
        out["output"] = ((vocab, h), h**-0.5)
    return {name + ".weight": value for name, value in out.items()}


# dmin / d (or m / d) that makes the mean of random codes zero.
_MEAN = {"Q4_1": -7.5, "Q5_1": -15.5, "Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}


def _random(
    rng: np.random.Generator, fmt: str, shape: tuple[int, ...], spread: float
) -> NDArray[np.generic]:
    """Random weights of standard deviation ``spread``: floats, or uint8 with rows of blocks."""
    if fmt == "F64":  # which no backend reads
        return spread * rng.standard_normal(shape)
    if fmt not in FIELDS:
        values = (spread * rng.standard_normal(shape)).astype(np.float32)
        return gguf.quants.quantize(values, Type[fmt])  # type: ignore[no-any-return]
    size, nbytes = gguf.GGML_QUANT_SIZES[Type[fmt]]
    blocks = rng.integers(0, 256, (int(np.prod(shape)) // size, nbytes), np.uint8)

    def set_scales(d: NDArray[np.float64]) -> None:
        set_d(fmt, blocks, d)
        set_dmin(fmt, blocks, d * _MEAN.get(fmt, 0))

    set_scales(np.ones(len(blocks)))
    unit = UNIT.get(fmt) or gguf.quants.dequantize(blocks[:256], Type[fmt]).std()
    set_scales(spread / unit * rng.uniform(0.5, 1.4, len(blocks)))
    return blocks.reshape(*shape[:-1], -1)


def _hyper_parameters(g: Geometry) -> dict[str, object]:
    common: dict[str, object] = {
        "block_count": g.layers,
        "context_length": g.context,
        "embedding_length": g.hidden,
        "feed_forward_length": g.ffn,
        "attention.head_count": g.heads,
        "attention.head_count_kv": g.kv_heads,
        "attention.key_length": g.head_dim,
        "attention.value_length": g.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": g.rope_base,
    }
    if g.experts:
        common |= {
            "expert_count": g.experts,
            "expert_used_count": g.experts_used,
            "expert_feed_forward_length": g.ffn,
        }
    return {f"{g.arch}.{key}": value for key, value in common.items()}


def _small_vocabulary(g: Geometry) -> dict[str, object]:
    """The 256 byte characters, merges of two letters up to the size wanted, 3 control tokens."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = [chr(b) for b in printable]
    characters += [chr(256 + n) for n in range(256 - len(printable))]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pairs = list(product(ascii_lowercase, ascii_lowercase))[: g.vocab - 256 - len(control)]
    tokens = characters + ["".join(pair) for pair in pairs] + control
    assert len(tokens) == g.vocab, f"vocab: from 259 to 935, got {g.vocab}"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - len(control)) + [3] * len(control),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }


def _copied(vocabulary: Path) -> dict[str, object]:
    with GGUFFile.open(vocabulary) as file:
        return {k: v for k, v in file.metadata.items() if k.startswith("tokenizer.")}


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)  # type: ignore[arg-type]
