"""Files that others made, opened only if they are files."""

import stat
from pathlib import Path

from isobit import arguments
from isobit.errors import FileRefused, no_such_file

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def is_named_pipe(path: str | Path) -> bool:
    """Whether a pipe stands at a path, which opening would wait for; ``<(a command)`` is none."""
    file = Path(path)
    try:
        return file.is_fifo() and file.resolve().exists()
    except (OSError, ValueError):  # opening says it better
        return False


def regular(path: str | Path, what: str) -> Path:
    """The path, refused if something stands there that is no file: a pipe would be waited for.

    what: what is expected, for the message. Raises FileRefused; UsageError for what is no path.
    """
    path = Path(arguments.path("path", path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise FileRefused(no_such_file(path)) from None
    except OSError:  # opening says it better
        return path
    except ValueError:
        raise FileRefused(f"expected {what}, got a file name with a NUL in it") from None
    kind = next((name for holds, name in _KINDS if holds(mode)), None)
    if kind is not None:
        raise FileRefused(f"{path}: expected {what}, got {kind}")
    return path
