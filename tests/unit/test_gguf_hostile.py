"""Damaged and hostile files: one clear line each, never a crash, a hang or a large allocation."""

import os
import re
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isobit.errors import ModelRefused
from isobit.gguf import header
from isobit.gguf.formats import dequantize
from isobit.gguf.reader import GGUFFile
from isobit.model.checkpoint import open_model

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
HUGE = 1 << 60


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def key(name: str, type_id: int, payload: bytes) -> bytes:
    return string(name) + u32(type_id) + payload


def array(type_id: int, n: int, payload: bytes = b"") -> bytes:
    return u32(type_id) + u64(n) + payload


def tensor(name: str | bytes, dims: list[int], type_id: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def model(
    keys=(), tensors=(), data=b"", *, magic=b"GGUF", version=3, n_keys=None, n_tensors=None
) -> bytes:
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(keys) if n_keys is None else n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


DATA = bytes(range(256)) * 3
SMALL = model(
    [
        key("general.architecture", STRING, string("test")),
        key("general.alignment", U32, u32(32)),
        key("x.count", U64, u64(3)),
        key("x.scale", F32, struct.pack("<f", 0.5)),
        key("x.flag", BOOL, b"\1"),
        key("x.tokens", ARRAY, array(STRING, 3, string("a") + string("") + string("ü"))),
        key("x.types", ARRAY, array(U32, 3, u32(1) + u32(2) + u32(3))),
        key("x.nested", ARRAY, array(ARRAY, 1, array(STRING, 1, string("deep")))),
    ],
    [
        tensor("norm", [8]),
        tensor("matrix", [256, 2], 12, 32),
        tensor("stack", [32, 2, 3], 8, 320),
    ],
    DATA,
)
HEAD = SMALL.index(b"stack") + 5 + 4 + 3 * 8 + 4 + 8  # the bytes before padding and data


def refusal_of(path) -> str:
    """The one line with which a file is refused; opening it must cost next to no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(ModelRefused) as refused:
            GGUFFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    line = str(refused.value)
    assert line.startswith(f"{path}: ") or not str(path).isprintable()
    assert ": expected " in line
    assert ", got " in line
    assert line.isprintable()
    assert len(line) < 600 + len(str(path))
    return line


def tensors(*entries: bytes) -> bytes:
    return model([], entries, bytes(1024))


def metadata(*entries: bytes) -> bytes:
    return model(entries)


NESTED = array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, array(ARRAY, 1, array(U32, 0)))))

REFUSED = {
    "an empty file": (b"", "magic: expected the four bytes b'GGUF', got b''"),
    "a short magic": (b"GGU", "magic: expected the four bytes b'GGUF', got b'GGU'"),
    "another magic": (model(magic=b"GGML"), "magic: .* got b'GGML'"),
    "nothing after the magic": (b"GGUF", "version: expected 4 bytes or more, got 0 up to the end"),
    "version 1": (model(version=1), "version: expected little-endian GGUF version 2 or 3, got 1"),
    "version 4": (model(version=4), "version: .* got 4"),
    "big-endian": (model(version=3 << 24), r"got a big-endian file \(version 3\)"),
    "no counts": (SMALL[:12], "tensor count: expected 8 bytes or more, got 4"),
    "many tensors": (model(n_tensors=HUGE), f"tensor count: expected at most 65536, got {HUGE}"),
    "many keys": (model(n_keys=2**64 - 1), "metadata key count: expected at most 65536"),
    "more tensors than bytes": (model(n_tensors=60000), "tensor count: expected 1980000 bytes"),
    "more keys than bytes": (model(n_keys=60000), "metadata key count: expected 840000 bytes"),
    "one key too few": (
        model([key("a", STRING, string("x" * 50))], n_keys=2)[:96],
        "metadata key 1 length: expected 8 bytes or more, got 1 up to the end of the file",
    ),
    # metadata
    "a long key": (metadata(u64(HUGE) + bytes(64)), "metadata key 0 length: .* 65535 bytes"),
    "a key that is cut": (metadata(u64(60000) + bytes(64)), "metadata key 0: expected 60000"),
    "a key without name": (metadata(key("", BOOL, b"\0")), "expected a name of its own, got noth"),
    "a key twice": (metadata(*[key("a", BOOL, b"\0")] * 2), "metadata 'a': .* got a duplicate"),
    "a key of bad UTF-8": (metadata(string(b"\xff") + u32(BOOL) + b"\0"), "metadata key 0: exp.*U"),
    "an unknown value type": (metadata(key("a", 13, bytes(8))), "metadata 'a' type: .* got 13"),
    "an unknown element type": (
        metadata(key("a", ARRAY, array(99, 1, bytes(8)))),
        "'a' type: .*99",
    ),
    "a boolean of 2": (
        metadata(key("a", BOOL, b"\2")),
        "metadata 'a': expected a boolean .* got 2",
    ),
    "a boolean of 3 in an array": (metadata(key("a", ARRAY, array(BOOL, 2, b"\1\3"))), "got 3"),
    "a huge string": (metadata(key("a", STRING, u64(HUGE))), "metadata 'a' length: .* got 115292"),
    "a string that is cut": (metadata(key("a", STRING, u64(999))), "metadata 'a': expected 999"),
    "a string of bad UTF-8": (
        metadata(key("a", STRING, string(b"ab\xc3("))),
        "metadata 'a': expected UTF-8, got invalid continuation byte at byte 2",
    ),
    "an encoded surrogate": (metadata(key("a", STRING, string(b"\xed\xa0\x80"))), "UTF-8"),
    "a huge array": (metadata(key("a", ARRAY, array(U32, HUGE))), "'a' length: expected at most"),
    "an array that is cut": (metadata(key("a", ARRAY, array(U32, 99))), "'a': expected 396 bytes"),
    "a huge string array": (metadata(key("a", ARRAY, array(STRING, HUGE))), "'a' length: .* at m"),
    "a string array that is cut": (
        metadata(key("a", ARRAY, array(STRING, 9, string("x")))),
        "metadata 'a': expected 72 bytes or more",
    ),
    "a huge string in an array": (
        metadata(key("a", ARRAY, array(STRING, 2, string("x") + u64(2**64 - 1)))),
        r"metadata 'a'\[1\]: expected a string, got one beyond the end of the file",
    ),
    "a string array cut in a length": (
        model([key("a", ARRAY, array(STRING, 3, string("x" * 20) + string("y")))])[:88],
        r"metadata 'a'\[2\]: expected a string, got one beyond the end of the file",
    ),
    "bad UTF-8 in an array": (
        metadata(key("a", ARRAY, array(STRING, 2, string("x") + string(b"\x80")))),
        r"metadata 'a'\[1\]: expected UTF-8, got invalid start byte",
    ),
    "huge nested arrays": (metadata(key("a", ARRAY, array(ARRAY, HUGE))), "'a' length"),
    "nested arrays that are cut": (metadata(key("a", ARRAY, array(ARRAY, 99))), "1188 bytes"),
    "deep arrays": (
        metadata(key("a", ARRAY, NESTED)),
        "expected at most 4 nested arrays, got more",
    ),
    "arrays too long together": (
        metadata(key("a", ARRAY, array(ARRAY, 2, array(U32, 0) + array(U32, 1 << 22)))),
        "expected at most 4194304 array elements in all, got 4194306",
    ),
    "many arrays in arrays": (
        metadata(key("a", ARRAY, array(ARRAY, 65537, array(U32, 0) * 65537))),
        "expected at most 65536 arrays in arrays in all, got 65537",
    ),
    "alignment 0": (metadata(key("general.alignment", U32, u32(0))), "alignment': .* got 0"),
    "alignment 4": (metadata(key("general.alignment", U32, u32(4))), "power of two, at least 8"),
    "alignment 48": (metadata(key("general.alignment", U32, u32(48))), "alignment': .* got 48"),
    "alignment of text": (
        metadata(key("general.alignment", STRING, string("x" * 500))),
        "alignment': .* got 'x{100}…'",
    ),
    # tensors
    "a tensor without name": (tensors(tensor("", [1])), "tensor '': .* got nothing"),
    "a tensor twice": (tensors(*[tensor("t", [1])] * 2), "tensor 't': .* got a duplicate"),
    "a long tensor name": (tensors(tensor("t" * 65, [1])), "name of tensor 0 length: .* 64 bytes"),
    "a tensor name of bad UTF-8": (tensors(tensor(b"\xfe", [1])), "name of tensor 0: .* UTF-8"),
    "an escape in a name": (tensors(tensor("\x1b[2J\n", [0])), r"tensor '\\x1b\[2J\\n' dim"),
    "no dimensions": (tensors(tensor("t", [])), "'t' dimension count: expected 1 to 4, got 0"),
    "five dimensions": (tensors(tensor("t", [1] * 5)), "'t' dimension count: .* got 5"),
    "2^31 dimensions": (tensors(string("t") + u32(1 << 31) + bytes(64)), "expected 1 to 4"),
    "a zero dimension": (tensors(tensor("t", [4, 0])), r"every one at least 1, got \[4, 0\]"),
    "an unsupported type": (tensors(tensor("t", [256], 9)), "type of tensor 't': .* got Q8_1"),
    "an unknown type": (tensors(tensor("t", [256], 1 << 31)), "got type 2147483648"),
    "part of a block": (tensors(tensor("t", [128], 12)), "'t' row length: .*256 .*Q4_K, got 128"),
    "blocks across rows": (tensors(tensor("t", [128, 2], 12)), "'t' row length: .* got 128"),
    "an overflowing shape": (tensors(tensor("t", [1 << 32, 1 << 32])), "its end within the file"),
    "a shape that wraps to 0": (tensors(tensor("t", [1 << 62, 4])), "its end within the file's"),
    "a negative dimension": (tensors(tensor("t", [2**64 - 1])), "its end within the file's"),
    "a tensor past the end": (tensors(tensor("t", [257])), "got 1028 bytes of shape .257. from"),
    "an offset past the end": (tensors(tensor("t", [1], 0, 1024)), "got 4 bytes of shape"),
    "an offset that wraps": (tensors(tensor("t", [1], 0, 2**64 - 32)), "its end within"),
    "a tensor one byte too long": (
        tensors(tensor("t", [256]))[:-1],
        "its end within the file's 1087 bytes, got 1024 bytes",
    ),
    "an unaligned offset": (tensors(tensor("t", [1], 0, 8)), "offset: .* alignment 32, got 8"),
    "overlapping tensors": (
        tensors(tensor("a", [8], 0, 32), tensor("b", [16])),
        "tensor 'a' offset: expected 160 or more, where 'b' ends, got 128",
    ),
    "tensors overlapping by four bytes": (
        tensors(tensor("a", [9]), tensor("b", [8], 0, 32)),
        "tensor 'b' offset: expected 132 or more, where 'a' ends, got 128",
    ),
    "tensors in one place": (tensors(tensor("a", [8]), tensor("b", [8])), "where 'a' ends"),
    "a cut directory": (
        SMALL[: SMALL.index(b"stack") + 20],
        "tensor 'stack' dimensions: exp.* 8 b",
    ),
}


@pytest.mark.parametrize(("raw", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path, raw, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    line = refusal_of(path)
    assert re.search(message, line), line


def test_the_small_model_is_valid(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(SMALL)
    check_whole(GGUFFile.open(path))


def test_the_names_of_things_that_are_not_files(tmp_path):
    assert "got a folder" in refusal_of(tmp_path)
    (tmp_path / "modle.gguf").touch()
    for name, line in (
        ("model.gguf", f"no such file: '{tmp_path}/model.gguf'; did you mean '{tmp_path}/modle"),
        ("a\0b", f"no such file: '{tmp_path}/a\\x00b'"),
        ("two\nlines\x1b[31m", f"no such file: '{tmp_path}/two\\nlines\\x1b[31m'"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(ModelRefused) as refused:
            GGUFFile.open(tmp_path / name)
        assert line in str(refused.value)
        assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    ("first", "way_on"),
    [
        (b"\x40\0\0\0\0\0\0\0{", "got safetensors; give its folder, which is read"),
        (b"PK\x03\x04", "got a PyTorch checkpoint"),
        (b"version https://git-lfs", "git lfs pull fetches it"),
        (b"<!DOCTYPE html>", "got a web page"),
    ],
)
def test_files_of_other_kinds_are_known(tmp_path, first, way_on):
    path = tmp_path / "m.gguf"
    path.write_bytes(first)
    assert way_on in refusal_of(path)


def test_a_folder_of_safetensors_is_known(tmp_path):
    (tmp_path / "model.safetensors").touch()
    assert "without the config.json" in refusal_of(tmp_path)
    (tmp_path / "m.gguf").touch()
    for open_it in (GGUFFile.open, open_model):
        with pytest.raises(ModelRefused, match=r"the GGUF files in it: m\.gguf"):
            open_it(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "expected a regular file, got something else" in refusal_of(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (model([key("a", ARRAY, array(STRING, 1 << 23))]), "array elements in all, got 8388608"),
        (model([key("a", STRING, u64(1 << 27))]), "length: expected at most 67108864 bytes"),
        (model([key("a", STRING, u64(1 << 26))]), "up to the limit for headers, 67108864 bytes"),
        (model([], n_tensors=1 << 17), "tensor count: expected at most 65536"),
        (model([], n_tensors=1 << 16), "name of tensor 0"),
        (model([], n_keys=1 << 16), "metadata key 0"),
    ],
)
def test_a_sparse_file_of_64_gib_earns_no_larger_limits(tmp_path, head, message):
    path = tmp_path / "m.gguf"
    path.write_bytes(head)
    try:
        os.truncate(path, 1 << 36)
    except OSError as error:
        pytest.skip(f"no sparse file of 64 GiB here: {error}")
    if "name of tensor" in message or "metadata key 0" in message:  # zeros: an empty name
        with pytest.raises(ModelRefused, match="a name of its own"):
            GGUFFile.open(path)
    else:
        assert message in refusal_of(path)


def check_whole(file: GGUFFile) -> None:
    """What an accepted file promises."""
    at = 0
    for info in sorted(file.tensors.values(), key=lambda t: t.offset):
        assert at <= info.offset
        at = info.offset + info.nbytes
        assert at <= file.file_size
        assert all(n >= 1 for n in info.shape)
        data = file.data(info.name)
        assert data.size == info.nbytes
        assert dequantize(info.format, data, info.shape).shape == info.shape
    assert all(isinstance(v, int | float | str | list) for v in file.metadata.values())


def open_damaged(path, raw: bytes) -> str:
    """Open damaged bytes: the line of refusal, or "" for a file that is valid all the same."""
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        file = GGUFFile.open(path)
    except ModelRefused as refused:
        line = str(refused)
        assert line.isprintable()
        assert ": expected " in line
        assert ", got " in line
        return line
    else:
        check_whole(file)
        return ""
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20


def test_every_truncation(tmp_path):
    """Cut anywhere, the small model is refused: its last tensor ends where the file does."""
    path = tmp_path / "m.gguf"
    whole = SMALL[: len(SMALL) - len(DATA) + 320 + 6 * 34]
    assert open_damaged(path, whole) == ""
    for n in [*range(HEAD), *range(HEAD, len(whole), 16)]:
        assert open_damaged(path, whole[:n]), n


def test_every_byte_of_the_header_changed(tmp_path):
    path = tmp_path / "m.gguf"
    refused = 0
    for at in range(HEAD):
        raw = bytearray(SMALL)
        raw[at] ^= 0x80
        refused += bool(open_damaged(path, bytes(raw)))
    assert refused > 0.9 * HEAD  # a changed number may be a valid one


def test_every_word_of_the_header_made_huge(tmp_path):
    path = tmp_path / "m.gguf"
    for at in range(HEAD):
        for value in (HUGE, 0) if at % 4 == 0 else (2**64 - 1,):
            open_damaged(path, SMALL[:at] + u64(value) + SMALL[at + 8 :])


EDIT = st.tuples(
    st.sampled_from(["replace", "insert", "delete", "duplicate"]),
    st.integers(0, HEAD),
    st.one_of(
        st.binary(min_size=1, max_size=12),
        st.sampled_from([0, 1, 2, 8, 9, 255, 1 << 16, 1 << 22, 1 << 31, HUGE, 2**64 - 1]).map(u64),
        st.integers(0, 45).map(u32),
    ),
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(edits=st.lists(EDIT, min_size=1, max_size=4), cut=st.none() | st.integers(0, len(SMALL)))
def test_random_damage(tmp_path, edits, cut):
    raw = SMALL
    for kind, at, piece in edits:
        n = len(piece)
        raw = {
            "replace": raw[:at] + piece + raw[at + n :],
            "insert": raw[:at] + piece + raw[at:],
            "delete": raw[:at] + raw[at + n :],
            "duplicate": raw[: at + n] + raw[at:],
        }[kind]
    open_damaged(tmp_path / "m.gguf", raw[:cut])


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(raw=st.binary(max_size=200), version=st.sampled_from([2, 3]))
def test_random_bytes(tmp_path, raw, version):
    open_damaged(tmp_path / "m.gguf", b"GGUF" + u32(version) + u64(1) + u64(1) + raw)


def test_limits_leave_room_for_real_models():
    assert header.ELEMENT_LIMIT >= 2 * 1_400_000
    assert header.HEADER_LIMIT >= 2 * (16 << 20)
    assert np.dtype("<u8").itemsize * header.ELEMENT_LIMIT <= header.HEADER_LIMIT
