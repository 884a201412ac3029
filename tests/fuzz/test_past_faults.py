"""What hostile inputs once found, each as the kind of fault that it is."""

import dataclasses
import os
import re
import resource
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import isobit
from isobit.cli import main, options_of
from isobit.config import EngineConfig
from isobit.contracts import document, lint, validate
from isobit.errors import BackendUnavailable, FileRefused, ModelRefused, NothingCompared, UsageError
from isobit.gguf.reader import GGUFFile
from isobit.inspect import inspect
from isobit.runtime.loaded import sample_path
from isobit.text.template import encode_chat
from isobit.text.tokenizer import Tokenizer
from isobit.verify.aprt import read_folder
from isobit.verify.compare import compare
from isobit.verify.receipt import Receipt
from isobit.verify.trace_file import Manifest, Trace
from tests.fuzz.gguf_file import ARRAY, STRING, Raw
from tests.fuzz.harness import ROOT
from tests.fuzz.targets.models import bases
from tests.helpers.contracts import broken

CONTRACT = ROOT / "contracts" / "qwen3-moe-forward-v1.yaml"
MOST = 1 << 22  # array elements that a header may have


def in_a_process(code: str, megabytes: int) -> str:
    """What a program prints that may take this much address space."""
    limit = megabytes << 20
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr[-500:]
    return done.stdout


def test_a_thread_that_the_system_refuses() -> None:
    """The process ended by SIGABRT: threads that had started were destroyed, not joined."""
    said = in_a_process(
        "import isobit\n"
        "try: isobit.load('sample', 'cpu', threads=1024)\n"
        "except isobit.errors.BackendUnavailable as error: print(error)\n"
        "model = isobit.load('sample', 'cpu', threads=1, context=64)\n"
        "model.generate([1], max_tokens=1)",
        4096,
    )
    assert "expected 1024, the system started" in said
    assert BackendUnavailable.exit_code == 4


HEADERS: dict[str, Callable[[], tuple[str, int, object]]] = {
    "millions of empty arrays": lambda: (
        "x",
        ARRAY,
        Raw(struct.pack("<IQ", ARRAY, MOST - 9999) + struct.pack("<IQ", 4, 0) * (MOST - 9999)),
    ),
    "millions of numbers where one is expected": lambda: (
        "qwen3moe.attention.head_count",
        ARRAY,
        Raw(struct.pack("<IQ", 12, MOST - 9999) + bytes(range(1, 9)) * (MOST - 9999)),
    ),
    "a merge of millions of spaces": lambda: (
        "tokenizer.ggml.merges",
        ARRAY,
        Raw(struct.pack("<IQQ", STRING, 1, 60 << 20) + b" " * (60 << 20)),
    ),
    "a long name of an architecture": lambda: ("general.architecture", STRING, "\x01" * (60 << 20)),
}


@pytest.mark.parametrize("name", HEADERS)
def test_work_before_refusal_in_a_header(name: str, tmp_path: Path) -> None:
    file = bases()[0].copy()
    file.put(*HEADERS[name]())
    path = tmp_path / "m.gguf"
    path.write_bytes(file.bytes())
    code = (
        "from isobit.inspect import inspect; from tests.fuzz.harness import peak_resident\n"
        f"try: print(max(map(len, inspect({str(path)!r}).refused)))\n"
        "except Exception as error: print(type(error).__name__, len(str(error)))\n"
        "print(peak_resident() >> 20)"
    )
    *said, megabytes = in_a_process(code, 3000).split("\n")[:-1]
    assert int(said[0].split()[-1]) < 600, said
    assert int(megabytes) < 600


def test_many_special_tokens_are_refused_before_an_automaton_is_built(tmp_path: Path) -> None:
    file = bases()[0].copy()
    for key, more in (
        ("tokens", [f"{i:050}" for i in range(200_000)]),
        ("token_type", [4] * 200_000),
    ):
        entry = file.key(f"tokenizer.ggml.{key}")
        assert entry is not None
        entry[2] = (entry[2][0], [*entry[2][1], *more])
    path = tmp_path / "m.gguf"
    path.write_bytes(file.bytes())
    assert "special tokens of at most" in (inspect(path).without_text or "")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    with GGUFFile.open(sample_path()) as file:
        return Tokenizer.from_metadata(file.metadata, "sample")


@pytest.mark.parametrize("text", [" " * 10**7, "\U0001f600" * (4 << 20), "a" * (4 << 20)])
def test_a_prompt_that_cannot_fit(text: str, tokenizer: Tokenizer) -> None:
    """A panic of the library in Rust is no Exception; tokenising took gigabytes."""
    with pytest.raises(UsageError):
        tokenizer.encode(text, special=True)
    with pytest.raises(UsageError, match="at most 4096 tokens"):
        tokenizer.encode(text, special=True, most=4096)


def test_a_template_that_renders_megabytes(tokenizer: Tokenizer) -> None:
    changed = Tokenizer(
        dataclasses.replace(tokenizer.vocabulary, chat_template="{{ '\U0001f600' * 4000000 }}")
    )
    with pytest.raises(ModelRefused, match="more than 4194304 bytes"):
        encode_chat(changed, [{"role": "user", "content": "hi"}])


def test_pages_of_a_pool_that_cannot_be() -> None:
    with pytest.raises(BackendUnavailable, match=r"KV cache: .* are left for them"):
        isobit.Model("sample", "cpu", EngineConfig(max_sequences=1 << 24, context=1 << 24))


def test_a_sequence_is_given_what_is_no_token() -> None:
    with isobit.load("sample", "cpu", context=64) as model:
        for call in (
            lambda: model.prefill(model.new_sequence(), []),
            lambda: model.step([model.new_sequence()], [10**6]),
            lambda: model.step([model.new_sequence()], [-1]),
        ):
            with pytest.raises(UsageError):
                call()


def findings_of(text: str, folder: Path) -> set[str]:
    (folder / "pyproject.toml").touch()
    (folder / "contracts").mkdir()
    (folder / "tests" / "x.d").mkdir(parents=True)
    path = folder / "contracts" / "c-v1.yaml"
    path.write_text(text)
    read = document.read(path)
    contract = validate.validate(read)
    assert contract is not None
    lint.lint(read, contract, options_of)
    return {finding.rule for finding in read.findings}


def cites(what: str) -> str:
    return CONTRACT.read_text().replace("\n  references:\n", f"\n  references:\n    - {what}\n", 1)


def test_counts_paths_and_folders_in_contracts(tmp_path: Path) -> None:
    """An exception ended the lint, and no finding was printed."""
    many = re.sub(
        r"pass_criteria:.*", f"pass_criteria: all {'9' * 5000} tests", CONTRACT.read_text()
    )
    for i, (text, rule) in enumerate(
        (
            (many, "test-count"),
            (cites("tests/" + "a" * 300 + ".py"), "cited-file"),
            (cites("tests/x.d::test_a"), "cited-test"),
            (cites("isobit nosuch"), "cited-option"),
            (cites("isobit devices") + "\nversio: 1\n", "unknown-key"),  # a command and no more
        )
    ):
        (tmp_path / str(i)).mkdir()
        assert rule in findings_of(text, tmp_path / str(i))


@pytest.mark.parametrize(
    ("what", "rule"),
    [
        ("A-" * 300_000 + "A", "obligation-uncovered"),  # once from each word of it to the end
        ("pytest -k nosuch " + "a" * 600_000, "cited-test"),
        ("pytest -k nosuch " + "a/" * 300_000, "cited-test"),  # a name that is too long to be
        ("isobit run -q; " * 40_000, "yaml-limit"),  # a parser for each
        (" ".join(f"tests/{i}.py" for i in range(50_000)), "yaml-limit"),
    ],
)
def test_long_texts_in_contracts(what: str, rule: str, tmp_path: Path) -> None:
    """Each took minutes to days; or an OSError came out."""
    text = broken(("    discharges: [AC_THING_001]\n", f"    test: {what}\n"))
    assert rule in findings_of(text, tmp_path)


def test_a_trace_whose_tokens_have_thousands_of_experts() -> None:
    """Each was held against each: 25 GB for a file of one."""
    said = in_a_process(
        "import numpy as np\n"
        "from isobit.verify.compare import compare\n"
        "from isobit.verify.trace_file import Manifest, Trace\n"
        "about = Manifest(tokens=[1], positions=[0], backend='x')\n"
        "ids = np.arange(160_000, dtype=np.int32)[None]\n"
        "def of(ids): return Trace(about, {'layers.0.moe_router_indices': ids,\n"
        "    'layers.0.moe_expert_out': np.zeros(ids.shape, 'f4')})\n"
        "print(compare(of(ids), of(ids[:, ::-1] + 1)).router_changed)",
        4096,
    )
    assert said == "1\n"


def test_an_imported_trace_without_tokens(tmp_path: Path) -> None:
    (tmp_path / "lm_head.bin").write_bytes(b"APRT" + struct.pack("<II", 2**32 - 1, 4) + bytes(16))
    with pytest.raises(UsageError, match="at least one"):
        read_folder(tmp_path, [])


def test_a_seed_below_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contract", "check", str(CONTRACT), "--seed", "-1"]) == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tensors",
    [
        {"lm_head": np.zeros((2, 1, 8), np.float32)},
        {
            "layers.0.moe_router_logits": np.zeros((2, 1, 4), np.float32),
            "layers.0.moe_router_indices": np.array([[0, 1], [2, 3]], np.int32),
        },
        {
            "layers.0.moe_router_logits": np.zeros((2, 1), np.float32),
            "layers.0.moe_router_indices": np.array([[0, 1], [2, 3]], np.int32),
        },
        {"layers.0.moe_router_indices": np.zeros((2, 2), np.float32)},
        {"lm_head": np.zeros((2, 8), np.int32)},
    ],
)
def test_traces_whose_shapes_no_run_makes(tensors: dict[str, object], tmp_path: Path) -> None:
    manifest = Manifest(tokens=[1, 2], positions=[0, 1], backend="cpu")
    Trace(manifest, tensors).save(tmp_path / "a.st")  # type: ignore[arg-type]
    with pytest.raises(NothingCompared):
        compare(Trace.load(tmp_path / "a.st"), Trace.load(tmp_path / "a.st"))


@pytest.mark.parametrize(
    "read", [Receipt.load, Trace.load, document.read], ids=["receipt", "trace", "contract"]
)
def test_a_pipe_is_not_waited_for(read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileRefused, match="got a named pipe"):
        read(tmp_path / "pipe")


@pytest.mark.parametrize(
    "command",
    [["batch", "a\0b", "-o", "x"], ["replay", "a\0b"], ["contract", "lint", "a\0b"]],
)
def test_a_file_name_with_a_nul(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command) in (2, 3)
    assert "NUL" in capsys.readouterr().err


@pytest.mark.parametrize("bits", [True, 16.0, "16", None, 12])
def test_activation_bits_that_only_look_right(bits: object) -> None:
    with pytest.raises(UsageError, match="activation_bits"):
        EngineConfig(activation_bits=bits)  # type: ignore[arg-type]
