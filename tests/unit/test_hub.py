"""Models by the names of the hub: what is chosen, fetched, resumed, checked, refused, removed."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.file_download
import pytest
from huggingface_hub import constants

from isobit.errors import ModelRefused, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.hub import cache, download, find, ollama
from isobit.hub.names import HubName, choose, variants
from tests.helpers.hub import COMMIT, Hub, serving
from tests.helpers.synth import Geometry, write_model

BODY = bytes(range(256)) * 400


def files(*quants: str, stem: str = "tiny") -> dict[str, bytes]:
    return {f"{stem}-{q}.gguf": f"{q} ".encode() + BODY for q in quants}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(files("Q8_0", "Q4_K_M"))) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # what is written at a time
        monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
        yield served


def cached_files(tmp_path: Path) -> set[str]:
    return {
        p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and ".locks" not in p.parts
    }


def test_a_model_is_fetched_once_and_is_where_other_tools_look(hub: Hub) -> None:
    notes: list[str] = []
    path = find("hf://org/tiny-GGUF", notes.append)
    assert path.read_bytes() == hub.files["tiny-Q4_K_M.gguf"]
    assert notes == ["hf://org/tiny-GGUF: Q4_K_M of Q4_K_M (0.0 GB), Q8_0 (0.0 GB)"]
    there = huggingface_hub.try_to_load_from_cache("org/tiny-GGUF", "tiny-Q4_K_M.gguf")
    assert there == str(path)
    assert path.resolve().name == hub.sha256("tiny-Q4_K_M.gguf")
    asked = len(hub.log)
    assert find("hf://org/tiny-GGUF", notes.append) == path
    assert notes[1:] == ["hf://org/tiny-GGUF: Q4_K_M, which is here"]
    assert len(hub.log) == asked


def test_what_another_tool_fetched_is_not_fetched_again(hub: Hub) -> None:
    path = huggingface_hub.hf_hub_download("org/tiny-GGUF", "tiny-Q8_0.gguf")
    hub.log.clear()
    assert find("hf://org/tiny-GGUF:q8_0") == Path(path)
    assert hub.log == []
    download.pull(HubName.parse("hf://org/tiny-GGUF:Q8_0"))
    assert all(method == "HEAD" or "/api/" in path for method, path, _ in hub.log)


def test_pull_brings_the_newer_revision(hub: Hub) -> None:
    name = HubName.parse("hf://org/tiny-GGUF")
    old = download.pull(name)
    hub.files["tiny-Q4_K_M.gguf"], hub.commit = b"newer", "f" * 40
    assert cache.cached(name) == old
    assert download.pull(name).read_bytes() == b"newer"
    assert cache.cached(name) != old


def test_a_name_whose_commit_was_not_written_is_fetched_again(hub: Hub, tmp_path: Path) -> None:
    path = find("hf://org/tiny-GGUF")
    (ref,) = (tmp_path / "cache").rglob("refs/main")
    ref.write_text("")
    assert cache.cached(HubName.parse("hf://org/tiny-GGUF")) is None
    assert find("hf://org/tiny-GGUF") == path
    assert ref.read_text() == COMMIT


def test_a_download_that_was_cut_off_goes_on(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 30_000
    with pytest.raises(ModelRefused, match="503"):
        find("hf://org/tiny-GGUF")
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    assert partial.stat().st_size == 30_000
    hub.cut = None
    hub.log.clear()
    assert find("hf://org/tiny-GGUF").read_bytes() == hub.files["tiny-Q4_K_M.gguf"]
    ranges = [asked for method, path, asked in hub.log if method == "GET" and "resolve" in path]
    assert ranges == ["bytes=30000-"]


@pytest.mark.parametrize("partial", [b"other bytes", b"x" * (len(BODY) + 7)])
def test_a_file_of_other_bytes_never_gets_into_the_cache(
    hub: Hub, tmp_path: Path, partial: bytes
) -> None:
    """What came is wrong from its beginning, as where a download was resumed on damaged bytes."""
    blobs = tmp_path / "cache" / "models--org--tiny-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hub.sha256('tiny-Q4_K_M.gguf')}.incomplete").write_bytes(partial)
    with pytest.raises(ModelRefused, match=r"expected SHA-256 .*, got .*; it came damaged"):
        find("hf://org/tiny-GGUF")
    assert cached_files(tmp_path) == set()
    assert find("hf://org/tiny-GGUF").read_bytes() == hub.files["tiny-Q4_K_M.gguf"]


def test_a_revision_that_changes_meanwhile_is_refused(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_need_room", lambda *_: setattr(hub, "commit", "f" * 40))
    with pytest.raises(ModelRefused, match="expected one revision, it changed meanwhile; pull"):
        download.pull(HubName.parse("hf://org/tiny-GGUF"))


def test_a_wrong_checksum_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.stated["tiny-Q4_K_M.gguf"] = "0" * 64
    got = hashlib.sha256(hub.files["tiny-Q4_K_M.gguf"]).hexdigest()
    with pytest.raises(ModelRefused, match=f"expected SHA-256 {'0' * 64}, got {got}"):
        find("hf://org/tiny-GGUF")
    assert cached_files(tmp_path) == set()


@pytest.mark.parametrize(
    ("status", "code", "line"),
    [
        (401, "RepoNotFound", "expected a repository, found none"),
        (404, "RepoNotFound", "expected a repository, found none"),
        (403, "GatedRepo", "accept its terms"),
        (404, "RevisionNotFound", "expected revision main, found none"),
        (500, None, "got 500 Internal Server Error from http://127"),
        (429, None, "got 429 Too Many Requests"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, status: int, code: str | None, line: str
) -> None:
    hub.status, hub.error = status, code
    with pytest.raises(ModelRefused, match=line) as refused:
        find("hf://org/tiny-GGUF")
    assert "\n" not in str(refused.value)


def test_no_hub_is_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.garbage = True
    with pytest.raises(ModelRefused, match="expected the hub's answer from"):
        find("hf://org/tiny-GGUF")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelRefused, match=r"expected to reach http://127.0.0.1:9, got: .*refused"):
        find("hf://org/tiny-GGUF")


@pytest.mark.parametrize(
    "wrong",
    [
        *({"sha256": text, "size": 3, "pointerSize": 134} for text in ("", "0" * 63, 5, None)),
        {"sha256": "../../../escaped", "size": 3, "pointerSize": 134},
        *(5, "x", {"size": 3}),
    ],
)
def test_a_digest_that_is_none_is_refused(hub: Hub, tmp_path: Path, wrong: object) -> None:
    """It becomes the name of a file: what lies elsewhere must not be written."""
    hub.siblings = [{"rfilename": "tiny-Q4_K_M.gguf", "size": 3, "lfs": wrong}]
    with pytest.raises(ModelRefused, match="each with its size and SHA-256, got something else"):
        find("hf://org/tiny-GGUF")
    assert not any(p.is_file() for p in tmp_path.rglob("*"))
    assert not list(tmp_path.rglob("escaped*"))


@pytest.mark.parametrize(
    "wrong", [5, [5], [{}], [{"rfilename": 5}], [{"rfilename": "m-Q4_K_M.gguf", "size": "x"}]]
)
def test_a_list_of_files_that_is_none_is_refused(hub: Hub, wrong: object) -> None:
    hub.siblings = wrong
    with pytest.raises(ModelRefused, match="expected the hub's list of files from http"):
        find("hf://org/tiny-GGUF")


def test_a_file_name_that_no_line_could_show_is_no_models(hub: Hub) -> None:
    hub.files = {"\x1b[2J\n.gguf": b"x", "a\nb-Q4_K_M.gguf": b"x"}
    with pytest.raises(ModelRefused, match=r"found no GGUF file$") as refused:
        find("hf://org/tiny-GGUF")
    assert str(refused.value).isprintable()


def test_offline_takes_what_is_here(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find("hf://org/tiny-GGUF:Q8_0")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert find("hf://org/tiny-GGUF:Q8_0") == path
    with pytest.raises(ModelRefused, match="HF_HUB_OFFLINE is set"):
        find("hf://org/tiny-GGUF:Q4_K_M")
    assert hub.log == []


def test_a_full_disk_is_one_line(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000))
        with pytest.raises(UsageError, match="GB of room in"):
            find("hf://org/tiny-GGUF")
        # Of what has come already only the rest is needed.
        blobs = tmp_path / "cache" / "models--org--tiny-GGUF" / "blobs"
        blobs.mkdir(parents=True)
        partial = blobs / f"{hub.sha256('tiny-Q4_K_M.gguf')}.incomplete"
        partial.write_bytes(hub.files["tiny-Q4_K_M.gguf"][:60_000])

        def write(url: str, out: object, **settings: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        full.setattr(download, "http_get", write)
        with pytest.raises(UsageError, match="found none left; what has come is kept"):
            find("hf://org/tiny-GGUF")
    assert partial.stat().st_size == 60_000


def test_a_folder_that_cannot_be_written_is_one_line(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match="Not a directory"):
        find("hf://org/tiny-GGUF")


def test_a_split_model_comes_whole(hub: Hub) -> None:
    hub.files |= {f"BF16/tiny-BF16-0000{n}-of-00003.gguf": b"part %d" % n for n in (1, 2, 3)}
    path = find("hf://org/tiny-GGUF:bf16")
    assert path.name == "tiny-BF16-00001-of-00003.gguf"
    assert sorted(p.read_bytes() for p in path.parent.iterdir()) == [
        b"part 1",
        b"part 2",
        b"part 3",
    ]
    path.with_name("tiny-BF16-00002-of-00003.gguf").unlink()
    assert cache.cached(HubName.parse("hf://org/tiny-GGUF:BF16")) is None  # is fetched again
    assert find("hf://org/tiny-GGUF:BF16") == path
    assert path.with_name("tiny-BF16-00002-of-00003.gguf").exists()


@pytest.mark.parametrize(
    ("names", "asked", "chosen"),
    [
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], "", "m-Q4_K_M.gguf"),
        (["m-Q8_0.gguf", "m-UD-Q4_K_XL.gguf", "m-IQ1_S.gguf"], "", "m-UD-Q4_K_XL.gguf"),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf"], ":q8_0", "m-Q8_0.gguf"),
        (["m.Q8_0.gguf", "m.i1-IQ4_XS.gguf"], ":IQ4_XS", "m.i1-IQ4_XS.gguf"),
        (["m-mxfp4.gguf", "mmproj-m-f16.gguf", "m-imatrix.gguf"], "", "m-mxfp4.gguf"),
        (["UD-Q2_K_XL/m-00001-of-00001.gguf", "Q8_0/m.gguf"], "", "Q8_0/m.gguf"),
        (["UD-Q2_K_XL/m-00001-of-00001.gguf"], ":UD-Q2_K_XL", "UD-Q2_K_XL/m-00001-of-00001.gguf"),
        (["F16/m-Q8_0.gguf", "m-Q4_K_M.gguf"], ":Q8_0", "F16/m-Q8_0.gguf"),
        (["only.gguf", "README.md"], "", "only.gguf"),
        (["a/m-Q4_K_M.gguf", "b/m-Q4_K_M.gguf"], "/b/m-Q4_K_M.gguf", "b/m-Q4_K_M.gguf"),
        (["a/m-Q4_K_M.gguf", "b/m-Q4_K_M.gguf"], "", "expected one model, found a/m"),
        (["m-Q4_K_M.gguf"], ":Q4_K", "expected this one, found Q4_K_M"),
        (["m-IQ1_S.gguf", "m-IQ2_M.gguf"], "", "expected one of these chosen, found IQ1_S, IQ2_M"),
        (["m-Q4_K_M-00001-of-00002.gguf", "README.md"], "", "found no GGUF file"),
        (["m-Q4_K_M.gguf"], "/other.gguf", "expected this one, found Q4_K_M"),
    ],
)
def test_which_file_a_name_means(names: list[str], asked: str, chosen: str) -> None:
    name = HubName.parse(f"hf://org/repo{asked}")
    if chosen.endswith(".gguf"):
        assert choose(name, variants(names)).files[0] == chosen
    else:
        with pytest.raises(ModelRefused, match=chosen):
            choose(name, variants(names))


@pytest.mark.parametrize(
    "name",
    ["hf://", "hf://org", "hf://../..", "hf://org/..", "hf://org/repo@../x", "hf://a/b:", "hf://a/b\n",
     "hf://org/repo/../../x.gguf", "hf://org/repo@a/../../x", "hf://org//repo", "hf://o/r/x.bin",
     "hf://a/-b", "hf://a/b.", "hf://.a/b", "hf://a--b/c", "hf://a/b..c", "hf://a/b.git",
     f"hf://a/{'b' * 97}"],
)  # fmt: skip
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match="expected hf://ORG/REPO"):
        find(name)


def test_names_are_read_and_written() -> None:
    for text in ("hf://a/b", "hf://a/b:Q8_0", "hf://a/b@v1.0:Q8_0", "hf://a/b@v1/x/y-z.gguf"):
        assert str(HubName.parse(text)) == text


def test_a_name_without_its_scheme_is_told_of() -> None:
    for text in ("unsloth/Qwen3-30B-A3B-GGUF:Q4_K_M", "https://huggingface.co/org/repo"):
        with pytest.raises(ModelRefused, match=r"a model of the Hugging Face hub is hf://[a-z]*/"):
            find(text)
    for text, wanted in (
        ("hf:a/b", "hf://a/b"),
        ("ollama:a:8b", "ollama://a:8b"),
        ("a:8b", "ollama://a:8b"),
    ):
        with pytest.raises(ModelRefused, match=f"no such file.* is {wanted}$"):
            GGUFFile.open(find(text))
    assert find("folder/file.gguf") == Path("folder/file.gguf")


def test_a_long_name_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    (tmp_path / "manifests").mkdir()
    long = "b" * 300
    for name in (f"a/{long}", f"{long}/a", f"{tmp_path}/manifests/{long}", f"ollama://{long}"):
        with pytest.raises(
            ModelRefused, match=r"File name too long|no such file|found no /.*; ollama"
        ):
            GGUFFile.open(find(name))


def test_a_cache_that_is_a_file_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"HF_HUB_CACHE: expected a folder, found .*, which is a"):
        cache.models()


def test_only_the_file_that_is_named_is_removed(hub: Hub) -> None:
    hub.files = {"m-Q8_0.gguf": b"one", "old/m-Q8_0.gguf": b"other"}
    for file in hub.files:
        find(f"hf://org/tiny-GGUF/{file}")
    (gone,) = cache.remove(HubName.parse("hf://org/tiny-GGUF/m-Q8_0.gguf"))
    assert gone.files == ("m-Q8_0.gguf",)
    assert [m.files for m in cache.models()] == [("old/m-Q8_0.gguf",)]


def test_models_are_listed_and_removed(hub: Hub, tmp_path: Path) -> None:
    assert cache.models() == []
    for quant in ("Q8_0", "Q4_K_M"):
        find(f"hf://org/tiny-GGUF:{quant}")
    hub.files["tiny-Q8_0.gguf"], hub.commit = b"newer", "f" * 40
    for quant in ("Q8_0", "Q4_K_M"):
        download.pull(HubName.parse(f"hf://org/tiny-GGUF:{quant}"))
    names = [str(m.name) for m in cache.models()]
    assert names == [
        "hf://org/tiny-GGUF:Q4_K_M", "hf://org/tiny-GGUF:Q8_0",
        f"hf://org/tiny-GGUF@{COMMIT}:Q4_K_M", f"hf://org/tiny-GGUF@{COMMIT}:Q8_0",
    ]  # fmt: skip
    assert all(find(name).exists() for name in names)

    (gone,) = cache.remove(HubName.parse("hf://org/tiny-GGUF:q4_k_m"))
    assert gone.nbytes == len(hub.files["tiny-Q4_K_M.gguf"])
    old = HubName.parse(f"hf://org/tiny-GGUF@{COMMIT}:Q4_K_M")
    assert find(str(old)).read_bytes() == hub.files["tiny-Q4_K_M.gguf"]  # they share a blob
    cache.remove(old)
    assert hub.sha256("tiny-Q4_K_M.gguf") not in cached_files(tmp_path)
    with pytest.raises(ModelRefused, match="found hf://org/tiny-GGUF:Q8_0; isobit models"):
        cache.remove(HubName.parse("hf://org/tiny-GGUF:Q4_K_M"))
    cache.remove(HubName.parse("hf://org/tiny-GGUF"))
    assert [str(m.name) for m in cache.models()] == [f"hf://org/tiny-GGUF@{COMMIT}:Q8_0"]


def test_ollamas_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path))
    digest = "sha256:" + "a" * 64
    manifest = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "qwen3" / "30b"
    manifest.parent.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / digest.replace(":", "-")
    blob.write_bytes(b"GGUF")
    layers = [
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "b" * 64},
        {"mediaType": "application/vnd.ollama.image.model", "digest": digest},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    assert find("ollama://qwen3:30b") == find(manifest) == find(str(manifest)) == blob
    assert ollama.models() == {"ollama://qwen3:30b": blob}
    with pytest.raises(
        ModelRefused, match=r"expected a manifest of Ollama, found no .*qwen3/latest"
    ):
        find("ollama://qwen3")
    for name in ("ollama://", "ollama://../../x", "ollama://a/../b", "ollama:///etc/passwd"):
        with pytest.raises(UsageError, match=r"expected ollama://NAME"):
            find(name)
    for content in (
        "",
        "[]",
        "{}",
        '{"layers": 3}',
        "[" * 100_000,
        '{"layers": [{"digest": 1}]}',
    ):
        manifest.write_text(content)
        with pytest.raises(ModelRefused, match="expected a manifest of Ollama, got something else"):
            find(manifest)
    for digest in ("sha256:../../../etc/passwd", "md5:" + "a" * 64):
        manifest.write_text(json.dumps({"layers": [{**layers[1], "digest": digest}]}))
        with pytest.raises(ModelRefused, match="expected one model's blob"):
            find(manifest)


def test_the_command_line_as_people_use_it(tmp_path: Path) -> None:
    model = write_model(tmp_path / "tiny-Q4_K_M.gguf", Geometry(layers=1))

    def isobit(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "isobit", *args],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, "HF_HOME": str(tmp_path / "home"), "OLLAMA_MODELS": "/none", **env},
        )

    with serving(Hub({model.name: model.read_bytes()})) as hub:
        pulled = isobit("pull", "hf://org/tiny-GGUF", HF_ENDPOINT=hub.url)
    assert pulled.returncode == 0, pulled.stderr
    assert Path(pulled.stdout.strip()).read_bytes() == model.read_bytes()
    name = "hf://org/tiny-GGUF:Q4_K_M"
    run = isobit("run", name, "--tokens", "1,2", "-n", "2", "--backend", "cpu", HF_HUB_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    listed = isobit("models")
    assert name in listed.stdout
    assert "removed hf://org/tiny-GGUF:Q4_K_M" in isobit("models", "--remove", name).stderr
    missing = isobit("inspect", name, HF_HUB_OFFLINE="1")
    assert missing.returncode == 3
    assert missing.stderr.count("\n") == 1
    assert "HF_HUB_OFFLINE is set" in missing.stderr
