"""Files of a checkpoint are hostile until checked: what is wrong is a refusal of one line."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from isobit.errors import ModelRefused
from isobit.model.checkpoint.shards import map_shard, read_bytes, read_json

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
DATA = bytes(range(32))


def written(folder: Path, header: object, length: int | None = None) -> Path:
    path = folder / "model.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + DATA)
    return path


def changed(name: str, **fields: object) -> dict[str, object]:
    return HEADER | {name: HEADER[name] | fields}


def test_what_is_right_is_read(tmp_path: Path) -> None:
    _, found, _ = map_shard(written(tmp_path, HEADER))
    np.testing.assert_array_equal(found["a"].array, np.frombuffer(DATA[:24], "<f4").reshape(2, 3))
    np.testing.assert_array_equal(found["b"].array, np.frombuffer(DATA[24:], "<u2"))


DEEP = json.loads("[" * 900 + "]" * 900)
WRONG = {
    "no shape": changed("b", shape=[]),
    "five sizes": changed("b", shape=[4, 1, 1, 1, 1]),
    "a size of 0": changed("b", shape=[0]),
    "a negative size": changed("a", shape=[-2, -3]),
    "a size that is no number": changed("a", shape=[2, True]),
    "sizes that wrap": changed("b", shape=[2**61, 2**61]),
    "an overflow": changed("b", shape=[2**64]),
    "more than there is": changed("b", shape=[5], data_offsets=[24, 34]),
    "another size": changed("b", shape=[3]),
    "offsets the wrong way": changed("b", data_offsets=[32, 24]),
    "one offset": changed("b", data_offsets=[24]),
    "a type that is not read": changed("b", dtype="I16"),
    "a type that is none": changed("b", dtype=DEEP),
    "a long type": changed("b", dtype="x" * 10_000),
    "no entry": HEADER | {"a": 5},
    "an escape in a name": HEADER | {"\x1b[2J\n": {}},
    "a list": [HEADER],
    "no JSON": b"{",
    "deep JSON": b"[" * 100_000,
}


@pytest.mark.parametrize("header", WRONG.values(), ids=WRONG)
def test_a_wrong_header_is_one_line(tmp_path: Path, header: object) -> None:
    with pytest.raises(ModelRefused) as refused:
        map_shard(written(tmp_path, header))
    line = str(refused.value)
    assert line.isprintable()
    assert ": expected " in line
    assert ", got " in line
    assert len(line) < 400 + len(str(tmp_path))


def test_any_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, good = random.Random(seed), json.dumps(HEADER).encode()
    read = 0
    for _ in range(300):
        text = bytearray(good)
        for _ in range(rng.choice([1, 2, 8])):
            text[rng.randrange(len(text))] = rng.choice(b'0123456789-{}[]",:eabF\xff')
        length = rng.choice([None, None, None, 0, len(good) - 1, len(good) + 40, 2**64 - 1])
        try:
            _, found, _ = map_shard(written(tmp_path, bytes(text), length))
        except ModelRefused:
            continue
        read += 1
        for stored in found.values():
            assert stored.array.tobytes() in DATA
    assert read > 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (map_shard, read_json, read_bytes):
        with pytest.raises(ModelRefused, match="expected a regular file, got something else"):
            read(tmp_path / "pipe")


def test_a_file_is_not_read_beyond_its_limit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_bytes(tmp_path / "f", 5) == b"12345"
    with pytest.raises(ModelRefused, match="expected at most 4 bytes, got more"):
        read_bytes(tmp_path / "f", 4)
