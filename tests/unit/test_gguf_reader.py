"""Reading well-formed files, against the ``gguf`` package."""

import hashlib
import threading
from importlib.resources import files
from pathlib import Path

import gguf
import numpy as np
import pytest

from isobit.errors import ModelRefused, UsageError
from isobit.gguf import reader
from isobit.gguf.formats import FORMATS, dequantize
from isobit.gguf.reader import GGUFFile
from tests.helpers.blocks import Type

SAMPLE = str(files("isobit") / "data" / "pycoder-moe-33m-Q4_K_M.gguf")
SAMPLE_SHA256 = "56306afd638240ef5bbf1ec27aa293e38d23f46119ba804d9fe009f37e29b22e"


@pytest.fixture(scope="module")
def sample():
    with GGUFFile.open(SAMPLE) as file:
        yield file


@pytest.fixture(scope="module")
def oracle():
    return gguf.GGUFReader(SAMPLE)


def write(path, add, tensors=()) -> str:
    """Write a file with the ``gguf`` package; ``add(writer)`` adds the metadata."""
    writer = gguf.GGUFWriter(str(path), "test")
    add(writer)
    for name, array, raw_dtype in tensors:
        writer.add_tensor(name, array, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def no_metadata(writer) -> None:
    """Leave the metadata at what every file has."""


def test_sample_metadata(sample, oracle):
    expected = {k: f.contents() for k, f in oracle.fields.items() if not k.startswith("GGUF.")}
    assert sample.metadata == expected
    assert list(sample.metadata) == list(expected)
    for key, value in expected.items():
        assert type(sample.metadata[key]) is type(value)
    assert sample.version == 3


def test_sample_tensors(sample, oracle):
    assert list(sample.tensors) == [t.name for t in oracle.tensors]
    for theirs in oracle.tensors:
        ours = sample.tensors[theirs.name]
        assert ours.name == theirs.name
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.format.name == theirs.tensor_type.name
        assert ours.offset == theirs.data_offset
        assert ours.nbytes == theirs.n_bytes
        data = sample.data(ours.name)
        assert (data.dtype, data.ndim) == (np.uint8, 1)
        assert not data.flags.writeable
        np.testing.assert_array_equal(data, theirs.data.reshape(-1).view(np.uint8))


def test_sample_weights(sample, oracle):
    """One tensor of each format in the sample, decoded from the map."""
    for theirs in {t.tensor_type: t for t in oracle.tensors}.values():
        info = sample.tensors[theirs.name]
        ours = dequantize(info.format, sample.data(info.name), info.shape)
        expected = gguf.quants.dequantize(theirs.data, theirs.tensor_type)
        np.testing.assert_array_equal(ours.view(np.uint32), expected.view(np.uint32))


def test_sha256(sample):
    calls = []
    digest = GGUFFile.open(SAMPLE).sha256(lambda done, total: calls.append((done, total)))
    assert digest == SAMPLE_SHA256 == sample.sha256() == sample.sha256()
    assert calls == [(16 << 20, sample.file_size), (sample.file_size, sample.file_size)]


def test_every_metadata_type(tmp_path):
    values = {
        "uint8": 255,
        "int8": -128,
        "uint16": 65535,
        "int16": -32768,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float32": float(np.float32(0.1)),
        "float64": 0.1,
        "bool": True,
        "string": "naïve 🐍\n",
        "array": ["", "ü", "a" * 300],
    }

    def add(writer):
        for kind, value in values.items():
            getattr(writer, f"add_{kind}")(f"a.{kind}", value)
        writer.add_array("a.ints", [1, -2, 3])
        writer.add_array("a.floats", [0.5, -0.25])
        writer.add_array("a.bools", [True, False])
        writer.add_array("a.nested", [["x", "y"], ["z"]])

    file = GGUFFile.open(write(tmp_path / "m.gguf", add))
    assert file.metadata == {
        "general.architecture": "test",
        **{f"a.{kind}": value for kind, value in values.items()},
        "a.ints": [1, -2, 3],
        "a.floats": [0.5, -0.25],
        "a.bools": [True, False],
        "a.nested": [["x", "y"], ["z"]],
    }
    assert type(file.metadata["a.bool"]) is bool
    assert file.tensors == {}


def test_every_format(tmp_path):
    rng = np.random.default_rng(0)
    tensors = []
    for fmt in FORMATS.values():
        rows = rng.integers(0, 256, (2, 3, 4 * fmt.block_bytes), dtype=np.uint8)
        tensors.append((f"t.{fmt.name}", rows, Type[fmt.name]))
    file = GGUFFile.open(write(tmp_path / "m.gguf", no_metadata, tensors))
    for (name, rows, _), fmt in zip(tensors, FORMATS.values(), strict=True):
        info = file.tensors[name]
        assert info.format is fmt
        assert info.shape == (2, 3, 4 * fmt.block_size)
        np.testing.assert_array_equal(file.data(name), rows.reshape(-1))


def test_large_vocabulary(tmp_path):
    tokens = [f"tök{i}" if i % 3 else "Ġ" * (i % 400) for i in range(151_936)]
    merges = [f"{i % 977} Ġ{i}" for i in range(151_387)]
    types = [i % 6 for i in range(len(tokens))]

    def add(writer):
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)

    file = GGUFFile.open(write(tmp_path / "m.gguf", add))
    assert file.metadata["tokenizer.ggml.tokens"] == tokens
    assert file.metadata["tokenizer.ggml.merges"] == merges
    assert file.metadata["tokenizer.ggml.token_type"] == types


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_alignment(tmp_path, alignment):
    arrays = [np.arange(5, dtype=np.float32), np.arange(7, dtype=np.float32)]
    path = write(
        tmp_path / "m.gguf",
        lambda w: w.add_custom_alignment(alignment),
        [("a", arrays[0], None), ("b", arrays[1], None)],
    )
    file = GGUFFile.open(path)
    for name, array in zip("ab", arrays, strict=True):
        assert file.tensors[name].offset % alignment == 0
        np.testing.assert_array_equal(file.data(name).view(np.float32), array)


def test_version_2_is_laid_out_like_3(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, lambda w: w.add_uint32("a.n", 7), [("t", np.ones((2, 3), np.float32), None)])
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.write_bytes(raw)
    file = GGUFFile.open(path)
    assert file.version == 2
    assert file.metadata["a.n"] == 7
    assert file.tensors["t"].shape == (2, 3)


def test_unsupported_types_are_refused_by_name_or_listed(tmp_path):
    tensors = [
        ("good", np.ones(4, np.float32), None),
        ("blk.0.up", np.zeros((2, 292), np.uint8), gguf.GGMLQuantizationType.Q8_K),
        ("blk.0.ids", np.zeros(3, np.int32), None),
    ]
    path = write(tmp_path / "m.gguf", no_metadata, tensors)
    with pytest.raises(ModelRefused, match=r"tensor 'blk\.0\.up'.*got Q8_K \(1 tensor\)"):
        GGUFFile.open(path)
    file = GGUFFile.open(path, strict=False)
    assert list(file.tensors) == ["good"]
    up, ids = file.refused.values()
    assert (up.name, up.shape, up.type_name) == ("blk.0.up", (2, 256), "Q8_K")
    assert (ids.name, ids.shape, ids.type_name) == ("blk.0.ids", (3,), "I32")
    with pytest.raises(ModelRefused, match=r"tensor 'blk\.0\.up': expected a tensor"):
        file.data("blk.0.up")


def test_views_outlive_the_file():
    with GGUFFile.open(SAMPLE) as file:
        view = file.data("output_norm.weight")
        copy = view.copy()
    np.testing.assert_array_equal(view, copy)
    with pytest.raises(UsageError, match="closed"):
        file.data("output_norm.weight")
    file.close()  # closing twice is harmless


def test_threads_may_share_a_file(sample):
    expected = {name: sample.data(name).copy() for name in list(sample.tensors)[:20]}
    wrong = []

    def read():
        for name, data in expected.items():
            if not np.array_equal(sample.data(name), data):
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_whole_file_is_hashed(tmp_path):
    path = tmp_path / "m.gguf"
    write(path, no_metadata, [("t", np.ones(3, np.float32), None)])
    path.write_bytes(path.read_bytes() + b"trailing")
    assert GGUFFile.open(path).sha256() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("fits", [True, False])
def test_a_file_that_fits_memory_asks_for_large_pages(monkeypatch, fits):
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("not run: this system has no large pages to ask for")
    size = Path(SAMPLE).stat().st_size
    monkeypatch.setattr(reader, "physical_memory", lambda: size + 1 if fits else size)
    with GGUFFile.open(SAMPLE) as file:
        first = min(file.tensors.values(), key=lambda t: t.offset)
        address = file.data(first.name).ctypes.data
        flags: list[str] = []
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head, _, rest = line.partition(" ")
            if "-" in head:
                start, end = (int(x, 16) for x in head.split("-"))
                inside = start <= address < end
            elif inside and head == "VmFlags:":
                flags = rest.split()
    assert flags
    assert ("hg" in flags) == fits
