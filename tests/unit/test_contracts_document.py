"""Reading YAML that nobody has checked: data, places, and what is refused."""

from pathlib import Path

import pytest

from isobit.contracts import document
from isobit.contracts.document import parse, read
from isobit.errors import FileRefused


def rules(text: str) -> list[tuple[str, int, int]]:
    return [(f.rule, f.line, f.column) for f in parse(text).findings]


def test_values_are_what_json_could_say() -> None:
    d = parse(
        "a: 1\nb: -2.5e-3\nc: yes\nd: true\ne: ~\nf:\ng: 2026-05-04\nh: '1'\ni: 1.0.0\n"
        "j: 0x10\nk: 12:30\nl: 1_000\nm: .inf\nn: [1, {x: y}]\no: '99999999999999999999'\n"
        "p: 99999999999999999999\n"
    )
    assert d.findings == []
    assert d.data == {
        "a": 1,
        "b": -0.0025,
        "c": "yes",
        "d": True,
        "e": None,
        "f": None,
        "g": "2026-05-04",
        "h": "1",
        "i": "1.0.0",
        "j": "0x10",
        "k": "12:30",
        "l": "1_000",
        "m": ".inf",
        "n": [1, {"x": "y"}],
        "o": "99999999999999999999",
        "p": 1e20,
    }


def test_places_are_those_of_the_text() -> None:
    text = "é: 'x𝄞'\nlist:\n  - a: 1\n    b: |\n      two\n      lines\n  - [3, 4]\n"
    d = parse(text)
    span = d.values["list", 0, "a"]
    assert (span.line, span.column) == (3, 8)
    assert text[span.start : span.end] == "1"
    assert d.keys["list", 0, "b"].line == 4
    assert d.values["list", 0, "b"].line == 4
    assert (d.values["list", 1, 1].line, d.values["list", 1, 1].column) == (7, 9)
    assert d.values["list",].block
    assert not d.values["list", 1].block


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a: [1\nb: 2\n", [("yaml-syntax", 2, 2)]),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", [("duplicate-key", 4, 3)]),
        ("a: &x 1\nb: *x\n", [("yaml-alias", 2, 4)]),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", [("yaml-alias", 3, 7)]),
        ("a: !!python/object/apply:os.system [id]\n", [("yaml-tag", 1, 4)]),
        ("a: !secret x\n", [("yaml-tag", 1, 4)]),
        ("a: 1\n? [b]\n: 2\n", [("yaml-key", 2, 3)]),
        ("a: 1\n---\nb: 2\n", [("yaml-syntax", 2, 1)]),
        ("a: \x07\n", [("yaml-syntax", 1, 1)]),
    ],
)
def test_what_is_refused(text: str, found: list[tuple[str, int, int]]) -> None:
    assert rules(text) == found


def test_a_bomb_of_aliases_stays_small() -> None:
    lines = ["a0: &a0 [x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    d = parse("\n".join(lines))
    assert {f.rule for f in d.findings} == {"yaml-alias"}
    assert len(d.values) < 200


def test_deep_long_and_many(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deepest = document.MAX_DEPTH
    assert rules("[" * deepest + "]" * deepest) == []
    assert rules("[" * (deepest + 1) + "]" * (deepest + 1)) == [("yaml-limit", 1, 1)]
    assert [r for r, *_ in rules("[" * 100_000)] == ["yaml-limit"]
    assert [r for r, *_ in rules("{a: " * 100_000)] == ["yaml-limit"]
    many = parse("a: 1\n" * 2000).findings
    assert [f.rule for f in many] == ["duplicate-key"] * 1000 + ["yaml-limit"]
    assert "findings, got more" in many[-1].message
    monkeypatch.setattr(document, "MAX_PARTS", 100)
    assert [r for r, *_ in rules("[" + "1," * 200 + "]")] == ["yaml-limit"]
    monkeypatch.setattr(document, "MAX_BYTES", 100)
    path = tmp_path / "x.yaml"
    path.write_text("a: " + "x" * 200)
    assert [f.rule for f in read(path).findings] == ["yaml-limit"]


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: caf\xe9")
    assert [f.rule for f in read(path).findings] == ["yaml-syntax"]
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read(path).data == {"a": 1, "b": 2}
    with pytest.raises(FileRefused, match=r"no such file: '.*/absent.yaml'"):
        read(tmp_path / "absent.yaml")
    for bad in (tmp_path, "nul\0"):
        with pytest.raises(FileRefused, match="expected a readable contract"):
            read(bad)
