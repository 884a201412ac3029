"""A GGUF file as data that can be changed in every place, and ways to change it."""

import random
import struct
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
STRING, ARRAY = 8, 9
FLOATS = (6, 12)

INTEGERS = [
    *(0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 63, 64, 65, 127, 128, 255, 256, 257, 511, 512, 4096),
    *(65535, 65536, 1 << 20, (1 << 24) - 1, 1 << 24, (1 << 24) + 1, 2**31 - 1, 2**31, 2**32 - 1),
    *(2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -128, -(2**31), -(2**63)),
]
REALS = [0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e-45, 1e-30, 1e-6]
REALS += [1e12, 1e13, 1e38, 1e308, 5e-324, 1.0000001, 10000.0]
STRINGS: list[str | bytes] = ["", "\0", "a" * 1000, "qwen3", "qwen3moe", "gpt2", "qwen2", "none"]
STRINGS += ["yarn", "\u202e\u2066", "𝔘𝔫", "\x1b[31m", "x\ny", "e\u0301", "{{ 1/0 }}", "%s%n{0}"]
STRINGS += [b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"ok\x80", "true"]
KEYS = [
    *("general.alignment", "split.count", "split.no", "general.architecture", "", "a" * 70000),
    *(f"qwen3moe.rope.{k}" for k in ("scaling.type", "scaling.factor", "dimension_count", "foo")),
    *(f"qwen3moe.attention.{k}" for k in ("causal", "sliding_window", "scale", "value_length")),
    *(f"qwen3moe.expert_{k}" for k in ("weights_scale", "shared_count", "gating_func", "group")),
    *(f"qwen3moe.{k}" for k in ("vocab_size", "leading_dense_block_count", "block_count")),
    *(f"tokenizer.ggml.{k}_token_id" for k in ("bos", "eos", "eot", "eom", "fim_pad", "unknown")),
    *("tokenizer.ggml.eos_token_ids", "tokenizer.ggml.add_bos_token", "tokenizer.chat_template"),
    *("tokenizer.chat_template.tool_use", "\n\x1b[0m"),
]
TEMPLATES = ["{{ messages }}", "{{ 'a' * 10**9 }}", "{{ ''.__class__ }}", "{", "", "{{ x.y.z }}"]


@dataclass
class Raw:
    """Bytes as they are, in the place of a value."""

    data: bytes


@dataclass
class Tensor:
    name: str | bytes
    dims: list[int]  # in ggml's order
    type: int
    offset: int
    n_dims: int | None = None


@dataclass
class File:
    keys: list[list[Any]]  # [name, type, value]; an array's value is (type, values)
    tensors: list[Tensor]
    data: bytes
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = field(default=32, repr=False)

    def copy(self) -> "File":
        """A copy to change; the weights are shared."""
        keys, tensors = deepcopy(self.keys), deepcopy(self.tensors)
        return File(keys, tensors, self.data, self.magic, self.version)

    def key(self, name: str) -> list[Any] | None:
        """A key to change."""
        return next((key for key in self.keys if key[0] == name), None)

    def put(self, name: str, kind: int, value: Any) -> None:
        """Set a key, or add it."""
        key = self.key(name)
        if key is None:
            self.keys.append([name, kind, value])
        else:
            key[1:] = [kind, value]

    def header(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        out = [self.magic, _whole(4, self.version), _whole(8, n_tensors), _whole(8, n_keys)]
        for name, kind, value in self.keys:
            out += [_value(STRING, name), _whole(4, kind), _value(kind, value)]
        for t in self.tensors:
            n_dims = len(t.dims) if t.n_dims is None else t.n_dims
            out += [_value(STRING, t.name), _whole(4, n_dims), *(_whole(8, d) for d in t.dims)]
            out += [_whole(4, t.type), _whole(8, t.offset)]
        return b"".join(out)

    def bytes(self) -> bytes:
        header = self.header()
        return header + bytes(-len(header) % self.alignment) + self.data


def parse(contents: bytes) -> File:
    """Read a file that is known to be good."""
    at = 4

    def number(form: str) -> Any:
        nonlocal at
        size = struct.calcsize(form)
        at += size
        return struct.unpack("<" + form, contents[at - size : at])[0]

    def value(kind: int) -> Any:
        nonlocal at
        if kind == STRING:
            size = number("Q")
            at += size
            return contents[at - size : at].decode()
        if kind == ARRAY:
            inner, n = number("I"), number("Q")
            return inner, [value(inner) for _ in range(n)]
        return number(NUMBERS[kind])

    version, n_tensors, n_keys = number("I"), number("Q"), number("Q")
    keys = [[value(STRING), kind := number("I"), value(kind)] for _ in range(n_keys)]
    tensors = []
    for _ in range(n_tensors):
        name = value(STRING)
        dims = [number("Q") for _ in range(number("I"))]
        tensors.append(Tensor(name, dims, number("I"), number("Q")))
    return File(keys, tensors, contents[at + -at % 32 :], version=version)


def _whole(width: int, n: int) -> bytes:
    return (n % (1 << 8 * width)).to_bytes(width, "little")


def _value(kind: int, value: Any) -> bytes:
    if isinstance(value, Raw):
        return value.data
    if kind == ARRAY:
        inner, values = value
        return (
            _whole(4, inner) + _whole(8, len(values)) + b"".join(_value(inner, v) for v in values)
        )
    if kind == STRING:
        data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
        return _whole(8, len(data)) + data
    if kind in FLOATS:
        try:
            return struct.pack("<" + NUMBERS[kind], float(value))
        except (OverflowError, ValueError, TypeError):
            return struct.pack("<" + NUMBERS[kind], float("inf"))
    width = struct.calcsize(NUMBERS.get(kind, "Q"))
    return _whole(width, value if isinstance(value, int) else 1)


def any_value(rng: random.Random, depth: int = 0) -> tuple[int, Any]:
    """A type and a value of it, or of another."""
    kind = rng.choice([*range(13), *([13, 255, 2**32 - 1] if rng.random() < 0.15 else [])])
    if kind == STRING:
        return kind, rng.choice(STRINGS)
    if kind == ARRAY:
        inner, n = rng.choice([0, 1, 4, 5, 6, 7, 8, 9, 10, 12, 13]), rng.choice([0, 1, 2, 5, 50])
        if inner == ARRAY:
            deeper = [any_array(rng, depth + 1) for _ in range(min(n, 3))] if depth < 7 else []
            return kind, (ARRAY, deeper)
        pool = STRINGS if inner == STRING else REALS if inner in FLOATS else INTEGERS
        return kind, (inner, [rng.choice(pool) for _ in range(n)])
    if kind in NUMBERS:
        return kind, rng.choice(REALS if kind in FLOATS else INTEGERS)
    return kind, Raw(rng.randbytes(8))


def any_array(rng: random.Random, depth: int) -> Any:
    while True:
        kind, value = any_value(rng, depth)
        if kind == ARRAY:
            return value


def change_key(rng: random.Random, file: File) -> None:
    if not file.keys:
        return
    key = rng.choice(file.keys)
    match rng.randrange(10):
        case 0:
            key[1:] = any_value(rng)
        case 1 | 2 | 3:  # of the same type, mostly
            pool = STRINGS if key[1] == STRING else REALS if key[1] in FLOATS else INTEGERS
            if key[1] != ARRAY:
                key[2] = rng.choice(pool)
        case 4:
            file.keys.remove(key)
        case 5:
            file.keys.append(list(key))
        case 6 | 7:
            file.put(rng.choice(KEYS), *any_value(rng))
        case 8:
            lengths = [0, 1, 3, 2**22, 2**22 + 1, 2**31, 2**61, 2**63, 2**64 - 1]
            raw = _whole(4, rng.choice([0, 4, 8, 9, 12, 13])) + _whole(8, rng.choice(lengths))
            key[1:] = ARRAY, Raw(raw + rng.randbytes(20))
        case _:
            deep = b"".join(
                _whole(4, ARRAY) + _whole(8, 1) for _ in range(rng.choice([2, 5, 5000]))
            )
            key[1:] = ARRAY, Raw(deep + _whole(4, 4) + _whole(8, 1) + bytes(4))


def change_tokenizer(rng: random.Random, file: File) -> None:
    tokens, types, merges = (
        file.key(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges")
    )
    found = (key for key in (tokens, types, merges) if key and key[1] == ARRAY)
    arrays = [key for key in found if not isinstance(key[2], Raw)]
    if len(arrays) < 3 or not (tokens and types and merges and tokens[2][1] and types[2][1]):
        return
    texts, kinds, pairs = tokens[2][1], types[2][1], merges[2][1]
    i = rng.randrange(len(texts))
    match rng.randrange(9):
        case 0:
            texts[i] = rng.choice(STRINGS)
        case 1:
            texts[i] = rng.choice(["<|", "<||>", "<|a|>", "<pad>", " ", "\n", "a b", "Ġ", "|", "é"])
        case 2:
            texts[i] = "x" * rng.choice([100, 10_000, 600_000])
        case 3:
            del texts[i:]
        case 4:
            for _ in range(rng.choice([1, 5, 200])):
                kinds[rng.randrange(len(kinds))] = rng.choice(
                    [1, 2, 3, 4, 5, 6, 0, 7, -1, 2**31 - 1]
                )
        case 5:
            del kinds[rng.randrange(len(kinds)) :]
        case 6:
            rng.shuffle(pairs)
        case _:
            odd = ["a", "", " ", "a  b", "a b c", "zz qq", "i n", "in in", "< |im_start|>", "Ġ  Ġ"]
            odd += ["x" * 5000 + " y", " ".join("a" * 3000), "a \u0100", "a b"]
            pairs.insert(rng.randrange(len(pairs) + 1), rng.choice(odd))


def change_tensor(rng: random.Random, file: File) -> None:
    if not file.tensors:
        return
    tensor, other = rng.choice(file.tensors), rng.choice(file.tensors)
    names = ["", "x" * 64, "x" * 65, b"\xff\xff", "\0", "blk.99.attn_q.weight", "output.weight"]
    match rng.randrange(9):
        case 0:
            tensor.name = rng.choice([other.name, *names])
        case 1:
            tensor.n_dims = rng.choice([0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1])
        case 2:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
        case 3:
            tensor.dims = rng.choice(
                [tensor.dims[::-1], [*tensor.dims, 1], tensor.dims[:-1] or [1]]
            )
        case 4:
            tensor.type = rng.choice([*range(45), 255, 2**31, 2**32 - 1])
        case 5:
            tensor.offset = rng.choice(INTEGERS)
        case 6:
            tensor.offset += rng.choice([1, -1, 8, 16, 32, -32, 1 << 20])
        case 7:
            file.tensors.remove(tensor)
        case _:
            tensor.offset, other.offset = other.offset, tensor.offset


def change_head(rng: random.Random, file: File) -> None:
    match rng.randrange(5):
        case 0:
            file.magic = rng.choice([b"FUGG", b"\0\0\0\0", b"GGML"])
        case 1:
            file.version = rng.choice([0, 1, 2, 4, 2**24 * 3, 2**32 - 1])
        case 2:
            file.n_tensors = rng.choice(INTEGERS)
        case 3:
            file.n_keys = rng.choice(INTEGERS)
        case _:
            file.put("tokenizer.chat_template", STRING, rng.choice(TEMPLATES))


def change(rng: random.Random, file: File) -> None:
    """Change a file in one to five places."""
    ways = [change_key, change_tokenizer, change_tensor, change_head]
    for _ in range(rng.choice([1, 1, 1, 2, 3, 5])):
        rng.choices(ways, [5, 4, 4, 1])[0](rng, file)


def damage(rng: random.Random, contents: bytes, before: int) -> bytes:
    """Flip, cut or insert bytes among the first ``before``."""
    data = bytearray(contents)
    i = rng.randrange(max(min(before, len(data)), 1))
    match rng.randrange(5):
        case 0 | 1:
            for _ in range(rng.choice([1, 1, 2, 8, 64])):
                data[rng.randrange(min(before, len(data)))] ^= 1 << rng.randrange(8)
        case 2:
            data[i : i + 8] = _whole(8, rng.choice(INTEGERS))
        case 3:
            del data[rng.choice([i, rng.randrange(len(data))]) :]
        case _:
            data[i : i + rng.choice([0, 1, 8])] = rng.randbytes(rng.choice([0, 1, 4, 100]))
    return bytes(data)
