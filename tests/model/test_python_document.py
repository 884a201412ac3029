"""What docs/python.md shows works as it stands there, and it names what there is."""

import re
from pathlib import Path

import isobit
from isobit import errors

DOCUMENT = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_examples_run_in_order() -> None:
    names: dict[str, object] = {}
    for n, block in enumerate(re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)):
        exec(compile(block, f"example {n + 1} of {DOCUMENT.name}", "exec"), names)
    assert len(names["texts"]) == 6  # type: ignore[arg-type]  # the last one's


def test_the_errors_and_methods_it_names_exist() -> None:
    text = DOCUMENT.read_text()
    for name in re.findall(r"`([A-Z][A-Za-z]+)`", text):
        assert hasattr(errors, name) or hasattr(isobit, name), name
    for name in re.findall(r"model\.([a-z_]+)\(", text):
        assert hasattr(isobit.Model, name), name
