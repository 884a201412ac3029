"""Amending: what is added, what is raised, and that every other byte stays."""

import difflib
from pathlib import Path

import pytest

from isobit.cli import main
from isobit.contracts import amend, document
from isobit.errors import UsageError
from tests.helpers.contracts import GOOD, broken

ENTRY = {"version": "1.2.0", "date": "2026-03-04", "kind": "amendment", "title": "It's: #1"}


def amended(text: str, entry: dict[str, str] | None = None, status: str | None = None) -> str:
    return amend.amended(document.parse(text, "thing-v1.yaml"), entry or ENTRY, status)


def difference(a: str, b: str) -> tuple[list[str], list[str]]:
    lines = list(difflib.ndiff(a.splitlines(keepends=True), b.splitlines(keepends=True)))
    return [x[2:] for x in lines if x[0] == "-"], [x[2:] for x in lines if x[0] == "+"]


def test_every_version_and_nothing_else() -> None:
    gone, come = difference(GOOD, amended(GOOD, status="DRAFT"))
    assert gone == ['  version: "1.1.0"\n', 'version: "1.1.0"\n', "status: ACTIVE_RUNTIME\n"]
    assert come == [
        '  version: "1.2.0"\n',
        '    - version: "1.2.0"\n',
        '      date: "2026-03-04"\n',
        "      kind: amendment\n",
        '      title: "It\'s: #1"\n',
        'version: "1.2.0"\n',
        "status: DRAFT\n",
    ]


def oldest_first(text: str) -> str:
    newest = GOOD[GOOD.index('    - version: "1.1.0"') : GOOD.index('    - version: "1.0.0"')]
    return text.replace(newest, "").replace("      title: First\n", "      title: First\n" + newest)


# Sections in another order, the history last.
LAST = GOOD[GOOD.index("kind: Kernel") :] + GOOD[: GOOD.index("kind: Kernel")]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (GOOD, 0),
        (oldest_first(GOOD), 2),
        (GOOD.replace("\n", "\r\n"), 0),
        (oldest_first(GOOD).replace("\n", "\r\n"), 2),
        (GOOD.replace("    - version", "    # a comment - with a dash\n    - version"), 0),
        (GOOD.replace("    - version", "    -\n      version"), 0),
        (GOOD.replace("    - version", "    - # newest - first\n      version"), 0),
        (oldest_first(GOOD).replace("kind: Kernel", "\n# later\nkind: Kernel"), 2),
        (GOOD.replace('"1.1.0"', "1.1.0").replace('"1.0.0"', "'1.0.0'"), 0),
        (GOOD.replace("    - ", "  - ").replace("\n      ", "\n    "), 0),
        (oldest_first(LAST), 2),
        (oldest_first(LAST)[:-1], 2),
    ],
)
def test_any_way_of_writing_it(text: str, place: int) -> None:
    new = amended(text, ENTRY | {"description": "One.\n\nTwo: # three " + "word " * 40})
    data = document.parse(new).data
    history = data["metadata"]["amendment_history"]
    assert history[place]["title"] == ENTRY["title"]
    assert history[place]["description"].startswith("One.\n\nTwo: # three word")
    assert len(history) == 3
    assert max(map(len, history[place]["description"].splitlines())) < 90
    assert data["version"] == data["metadata"]["version"] == "1.2.0"
    gone, _ = difference(text, new)
    assert len(gone) <= 3
    assert ("\r\n" in text) == ("\r\n" in new)
    assert new.count("\n") == new.count("\r\n") or "\r\n" not in new


def test_a_first_history() -> None:
    start, stop = GOOD.index("  amendment_history"), GOOD.index("kind: KernelContract")
    new = amended(GOOD[:start] + GOOD[stop:])
    assert [a["version"] for a in document.parse(new).data["metadata"]["amendment_history"]] == [
        "1.2.0"
    ]


@pytest.mark.parametrize(
    ("text", "entry", "said"),
    [
        (GOOD, ENTRY | {"version": "1.1.0"}, "expected one after 1.1.0, got 1.1.0"),
        (GOOD, ENTRY | {"version": "1.0.9"}, "expected one after 1.1.0, got 1.0.9"),
        (GOOD, ENTRY | {"date": "2026-02-02"}, "expected 2026-02-03 or later"),
        (
            "metadata: {version: 1.0.0, description: x, amendment_history: [{version: 1.0.0, "
            "date: 2026-01-01, title: x}]}\n",
            ENTRY,
            "lines of its own",
        ),
        ("{metadata: {version: 1.0.0, description: x}}\n", ENTRY, "by hand"),
        (GOOD, ENTRY | {"date": "2999-01-02"}, "date: expected a day that has come, got 2999"),
        (GOOD, ENTRY | {"version": "1.2"}, "one such as 1.0.0, got '1.2'"),
        (GOOD, ENTRY | {"title": "\udcff"}, "by hand"),
        (GOOD, ENTRY | {"description": "\a"}, "by hand"),
        (GOOD, ENTRY | {"title": "a\u0085b"}, "by hand"),
    ],
)
def test_what_is_refused(text: str, entry: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        amended(text, entry)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "thing-v1.yaml"
    path.write_text(GOOD)
    argv = ["contract", "amend", str(path), "--title", "x", "--date", "2026-03-04"]
    assert main([*argv, "--dry-run"]) == 0
    assert 'version: "1.2.0"' in capsys.readouterr().out
    assert path.read_text() == GOOD
    assert main([*argv, "--bump", "patch"]) == 0
    assert "1.1.0 to 1.1.1" in capsys.readouterr().out
    assert main(["contract", "validate", str(path)]) == 0
    assert main(["contract", "lint", str(path)]) == 0
    assert main([*argv, "--version", "3.0"]) == 2
    assert main([*argv, "--version", "x"]) == 2
    assert main([*argv[:-1], "yesterday"]) == 2
    assert main([*argv, "--bump", "major"]) == 0
    assert 'version: "2.0.0"' in path.read_text()
    path.write_text(broken(("  version:", "  verison:")))
    assert main(argv) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["thing-v1.yaml"]
