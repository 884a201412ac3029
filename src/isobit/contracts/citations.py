"""Files, tests and commands that a contract cites: do they exist?"""

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from isobit.contracts.document import Document, Key
from isobit.contracts.measures import Accuracy
from isobit.contracts.schema import Contract

Commands = Callable[[str], frozenset[str] | None]
"""The options of an isobit command ("run", "contract check"); None if there is no such command."""

_PATH = re.compile(
    r"(?<![\w/:.~-])((?:[\w.-]+/)+[\w.-]*\w\.[A-Za-z][A-Za-z0-9]{0,5})(?![\w/{*])(?:::(\w+))?"
)
_COMMAND = re.compile(r"(?<![\w./-])isobit ([a-z][a-z-]*)([^\n|;&>)`]*)")


def check_citations(document: Document, contract: Contract, commands: Commands) -> None:
    """Add a finding for everything cited that does not exist.

    Files are looked for in the repository that the contract lies in; outside of one they are left.
    """
    root = repository(Path(document.path))
    for at, text, severe in _texts(contract):
        if root is not None:
            _files(document, root, at, text, severe=severe)
        _commands(document, at, text, commands)


def repository(path: Path) -> Path | None:
    """The folder above a file that holds a repository or a Python project, if any."""
    folders = path.absolute().parents
    return next((f for f in folders if any((f / m).exists() for m in _MARKS)), None)


_MARKS = (".git", "pyproject.toml", "Cargo.toml")


def _texts(contract: Contract) -> Iterator[tuple[Key, str, bool]]:
    """What cites, and whether a citation that leads nowhere is an error."""
    for i, reference in enumerate(contract.metadata.references):
        yield ("metadata", "references", i), reference, False
    if contract.scope:
        yield ("scope",), contract.scope, False
    for i, stage in enumerate(contract.implementation_stages):
        for j, evidence in enumerate(stage.evidence):
            yield ("implementation_stages", i, "evidence", j), evidence, True
    for i, test in enumerate(contract.falsification_tests):
        if test.test:
            yield ("falsification_tests", i, "test"), test.test, True
        if isinstance(test.measure, Accuracy) and test.measure.text:
            yield ("falsification_tests", i, "measure", "text"), test.measure.text, True


def _files(document: Document, root: Path, at: Key, text: str, *, severe: bool) -> None:
    for name, test in _PATH.findall(text):
        if ".." in Path(name).parts:
            continue
        file = root / name
        if not _is_there(file):
            message = f"expected a file of this repository, got {name}, which is not there"
            document.find("cited-file", message, at, "error" if severe else "warning")
        elif test and not re.search(  # a folder has no tests
            rf"\b(def|class|fn) {test}\b", _text(file)
        ):
            message = f"expected a test of {name}, got {test}, which is not there"
            document.find("cited-test", message, at)


def _is_there(file: Path) -> bool:
    try:
        return file.exists()
    except OSError:  # a name longer than names can be
        return False


def _text(file: Path) -> str:
    return file.read_text("utf-8", errors="replace") if file.is_file() else ""


def _commands(document: Document, at: Key, text: str, commands: Commands) -> None:
    for name, rest in _COMMAND.findall(text):
        try:
            words = shlex.split(rest)
        except ValueError:
            words = rest.split()
        command = name
        if name == "contract" and words and not words[0].startswith("-"):
            command = f"{name} {words[0]}"
        options = commands(command)
        if options is None:
            message = f"expected a command of isobit, got isobit {command}, which there is not"
            document.find("cited-option", message, at)
            continue
        for word in words:
            option = word.split("=")[0]
            if option.startswith("--") and len(option) > 2 and option not in options:
                message = f"expected an option of isobit {command}, got {option}"
                document.find("cited-option", message, at)
