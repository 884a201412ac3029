"""Files and commands that a contract cites: do they exist?"""

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

from isobit.contracts import cited_tests
from isobit.contracts.cited_tests import is_there
from isobit.contracts.document import Document, Key
from isobit.contracts.findings import Severity
from isobit.contracts.kinds import Accuracy
from isobit.contracts.schema import Contract

NEAR = 0.8
"""How alike a name and a known one are, for the one to be meant as the other."""
Options = Mapping[str, Callable[[str], bool]]
"""Options of a command ("-p", "--backend"), each with a test of whether it takes a value."""
Commands = Callable[[str], Options | None]
"""The options of an isobit command ("run", "contract check"); None if there is no such command."""

_PATH = re.compile(
    r"(?<![\w/:.~-])((?:[\w.-]+/)+[\w.-]*\w\.[A-Za-z][A-Za-z0-9]{0,5})(?![\w/{*])((?:::\w+)*)"
)
_WRITTEN = re.compile(r"(?:^|\s)(?:>>?|-o|--output|--out|--html|--json|tee)[ =]*$")
_COMMAND = re.compile(r"(?<![\w./-])isobit ([a-z][a-z-]*)([^\n|;&>)`]*)")
_SOURCES = (
    *("c", "cc", "cfg", "cpp", "cu", "cuh", "go", "h", "hpp", "ini", "java", "js", "lean", "md"),
    *("proto", "py", "pyi", "rs", "rst", "sh", "sql", "toml", "ts", "txt", "wgsl", "yaml", "yml"),
)
"""Endings of what people write; the rest may come to be only when something runs."""


def check_citations(document: Document, contract: Contract, commands: Commands) -> None:
    """Add a finding for everything cited that does not exist.

    Files are looked for in the repository that the contract lies in; outside of one they are left.
    """
    root, commands = repository(Path(document.path)), cache(commands)
    for at, text, severe in _texts(contract):
        if root is not None:
            _files(document, root, at, text, severe=severe)
        _commands(document, at, text, commands)
        if root is not None and severe:
            cited_tests.check(document, root, at, text)
    _own_evidence(document, contract)


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
    for match in _PATH.finditer(text):
        name, names = match.groups()
        if document.full:
            return
        if ".." in Path(name).parts:
            continue
        file = root / name
        if not is_there(file):
            if not severe or not _comes_to_be(root, name, at, text[: match.start()]):
                message = f"expected a file of this repository, got {name}, which is not there"
                meant = severe and (at[0] != "falsification_tests" or _near(root, name))
                document.find("cited-file", message, at, "error" if meant else "warning")
        else:
            cited_tests.check_names(document, at, file, name, names.split("::")[1:])


def _comes_to_be(root: Path, name: str, at: Key, before: str) -> bool:
    """Whether a file that a test names may be one that is made, or brought, when it runs.

    That is what a command writes, and data whose folder the repository does not keep. Evidence has
    to be there.
    """
    if at[0] != "falsification_tests":
        return False
    if _WRITTEN.search(before):
        return True
    folder = (root / name).parent
    kept = is_there(folder) and any(f.suffix == Path(name).suffix for f in folder.iterdir())
    return name.rsplit(".", 1)[1].lower() not in _SOURCES and not kept


def _near(root: Path, name: str) -> bool:
    """Whether the outermost folder of a file is one of the repository's, or was to be one: what
    lies below any other may be another repository's, or made when something runs."""
    folders = [f.name for f in root.iterdir() if f.is_dir()]
    return bool(difflib.get_close_matches(name.partition("/")[0], folders, 1, NEAR))


def _own_evidence(document: Document, contract: Contract) -> None:
    """A contract is no evidence for what it promises."""
    own = Path(document.path).name
    for i, stage in enumerate(contract.implementation_stages):
        cited = [e for e in stage.evidence if own in re.findall(r"[\w.-]+", e)]
        if stage.evidence and len(cited) == len(stage.evidence):
            message = f"expected evidence for {stage.id} besides {own} itself, found none"
            at: Key = ("implementation_stages", i, "evidence")
            severity: Severity = "error" if stage.expected_acceptance else "warning"
            document.find("evidence-of-itself", message, at, severity)


def _commands(document: Document, at: Key, text: str, commands: Commands) -> None:
    for name, rest in _COMMAND.findall(text):
        if document.full:
            return
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
        for word, following in zip(words, [*words, ""][1:], strict=True):
            _option(document, at, f"isobit {command}", options, word, following)


def _option(
    document: Document, at: Key, command: str, options: Options, word: str, following: str
) -> None:
    if not re.match(r"--[A-Za-z]|-[A-Za-z]$", word):
        return
    option, is_assigned, value = word.partition("=")
    if option not in options:
        document.find("cited-option", f"expected an option of {command}, got {option}", at)
        return
    value = value if is_assigned else following
    if re.fullmatch(r"[a-z0-9._-]+", value) and not options[option](value):  # else a placeholder
        message = f"expected a value that {option} of {command} takes, got {value}"
        document.find("cited-option", message, at)
