"""``isobit batch``: every row once, whoever is killed; the answers are the server's."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest

from isobit.cli import main
from isobit.server.service import Service
from tests.helpers.command import ended, piped, run
from tests.server.stopping import WRITE, kill_when_it_stops, stopping
from tests.server.test_server import wait_for

BACKEND = ["--backend", "cpu", "--context", "1024"]


def write(path: Path, n: int, **body: Any) -> list[dict[str, Any]]:
    rows = [
        {
            "custom_id": f"row {i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": f"def f{i}(", "max_tokens": 8, "seed": i, **body},
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def answers(path: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row["response"] for row in rows}


def test_answers_are_the_servers(
    served: tuple[Service, openai.OpenAI], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, client = served
    rows = write(tmp_path / "in", 6)
    rows[5] |= {
        "url": "/v1/chat/completions",
        "body": {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5},
    }
    rows.append({**rows[0], "custom_id": "wrong", "body": {"model": "m", "prompt": 3.5}})
    (tmp_path / "in").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    out = tmp_path / "out"
    args = ["batch", str(tmp_path / "in"), "-o", str(out), *BACKEND, "--audit", "1"]
    assert main([*args, "--audit-backend", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "7 rows answered" in printed
    assert "1 of them refused" in printed
    assert "audit: 6 answers identical on cpu" in printed
    got = answers(out)
    assert got["wrong"]["status_code"] == 400
    assert "prompt" in got["wrong"]["body"]["error"]["message"]
    for row in rows[:5]:
        said = client.completions.create(**row["body"])
        (choice,) = got[row["custom_id"]]["body"]["choices"]
        assert choice["text"] == said.choices[0].text
        assert choice["isobit_receipt"]["sampling"]["seed"] == row["body"]["seed"]


def test_a_row_of_many_choices_is_answered_whatever_runs_at_once(tmp_path: Path) -> None:
    rows = write(tmp_path / "in", 2)
    for row in rows:
        row["body"] |= {"n": 66, "max_tokens": 1}  # more than run at once beside one
    (tmp_path / "in").write_text("\n".join(map(json.dumps, rows)))
    args = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *BACKEND, "--at-once", "1"]
    assert main(args) == 0
    assert [len(a["body"]["choices"]) for a in answers(tmp_path / "out").values()] == [66, 66]


def test_a_killed_batch_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "in", 60, max_tokens=24)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(["batch", str(tmp_path / "in"), "-o", str(whole), *BACKEND]) == 0
    command = [*stopping(WRITE, 4), "batch", str(tmp_path / "in"), "-o", str(out)]
    with subprocess.Popen([*command, *BACKEND, "--at-once", "2"]) as process:
        kill_when_it_stops(process)
    before = out.read_bytes()
    kept = before[: before.rfind(b"\n") + 1]
    assert kept.count(b"\n") == 3
    out.write_bytes(kept + b'{"id": "batch_req')  # as a kill within a write would leave it
    assert main(["batch", str(tmp_path / "in"), "-o", str(out), *BACKEND]) == 0
    assert out.read_bytes().startswith(kept)
    texts = [
        {name: a["body"]["choices"][0]["isobit_receipt"]["tokens"] for name, a in found.items()}
        for found in (answers(whole), answers(out))
    ]
    assert len(texts[0]) == 60
    assert texts[0] == texts[1]


def test_ctrl_c_says_how_far_it_got(tmp_path: Path) -> None:
    write(tmp_path / "in", 300, max_tokens=200)
    out = tmp_path / "out"
    command = ["batch", str(tmp_path / "in"), "-o", str(out), *BACKEND, "--at-once", "2"]
    with piped(command) as (process, _, stderr):
        wait_for(lambda: out.exists() and b"\n" in out.read_bytes())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGINT)
        said = stderr.read().decode()
        assert ended(process) == 130
    n = len(answers(out))
    assert said.endswith(f"isobit: interrupted after {n} of 300 rows; start it again to go on\n")


def test_an_altered_answer_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", 3)
    out = tmp_path / "out"
    args = ["batch", str(tmp_path / "in"), "-o", str(out), *BACKEND]
    assert main(args) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    tokens = rows[1]["response"]["body"]["choices"][0]["isobit_receipt"]["tokens"]
    tokens[2]["token"] ^= 1
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([*args, "--audit", "1", "--audit-backend", "cpu"]) == 1
    name = rows[1]["custom_id"]
    assert name in capsys.readouterr().err
    assert main(["replay", str(out), "--backend", "reference"]) == 1  # all of its rows
    said = capsys.readouterr().err
    assert f"{out}, line 2 ({name}), of cpu" in said
    assert "at generated token 2: sampling" in said
    assert "1 of 3 receipts differ" in said
    rows[1]["response"] = {"status_code": 400, "body": {"error": {"message": "x"}}}  # has none
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["replay", str(out)]) == 0
    assert "identical: 16 tokens of 2 receipts on cpu" in capsys.readouterr().out
    assert run(["replay", "-"], typed=out.read_bytes()).returncode == 0


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: expected JSON"),
        ("[" * 100000, "line 2: expected JSON"),
        ("3", "line 2: custom_id: expected a name"),
        ('{"custom_id": "row 0", "url": "/v1/completions", "body": {}}', "no row before it has"),
        ('{"custom_id": "a", "url": "/v1/files", "body": {}}', "line 2: url: expected one of"),
        ('{"custom_id": "a", "url": "/v1/completions", "body": 3}', "line 2: body: expected"),
        (
            '{"custom_id": "a", "url": "/v1/completions", "body": {"stream": true}}',
            "line 2: body.stream: expected false",
        ),
    ],
)
def test_refusals(line: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "in", 1)
    with (tmp_path / "in").open("a") as file:
        file.write(line + "\n")
    assert main(["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *BACKEND]) == 3
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_answers_of_other_settings_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "in", 1)
    args = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *BACKEND]
    assert main(args) == 0
    assert main([*args, "--activation-bits", "8"]) == 2
    assert "another model or setting" in capsys.readouterr().err


def test_a_request_that_changed_is_not_taken_for_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write(tmp_path / "in", 2)
    args = ["batch", str(tmp_path / "in"), "-o", str(tmp_path / "out"), *BACKEND]
    assert main(args) == 0
    before = (tmp_path / "out").read_bytes()
    again = [dict(reversed(row.items())) for row in reversed(rows)]  # said in another order
    (tmp_path / "in").write_text("".join(json.dumps(row) + "\n" for row in again))
    assert main(args) == 0
    assert "2 rows of 2 finished before" in capsys.readouterr().err
    write(tmp_path / "in", 2, max_tokens=9)
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "custom_id 'row " in said
    assert "another request" in said
    assert (tmp_path / "out").read_bytes() == before
