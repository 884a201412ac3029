"""The process that renders chat templates; isobit.text.renderer starts it and never imports it.

A template comes with a model file and is a program. Jinja's immutable sandbox keeps it away from
Python's internals but cannot bound its time and memory: a few short lines make strings of
gigabytes or compare nested lists for hours, inside one operation where no counter is reached. So
it runs here, in a process with neither files nor environment variables to find, and that the
operating system stops at a limit of memory and a watchdog at a limit of time.

Protocol: READY once, then for every line of JSON on standard input

    {"template": source, "contexts": [variables, ...], "now": seconds since 1970 or null}

one line of JSON on standard output: {"texts": [...]}, one for each context, or
{"rejected": why} where the template called raise_exception, or {"failed": why}.
The process ends when its input does.

usage: python sandbox.py SECONDS MEGABYTES BYTES
"""

import faulthandler
import functools
import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace

READY = "ready\n"


class RejectionError(TemplateError):
    """The template's own objection to the messages."""


class Generation(Extension):
    """``{% generation %}``, with which templates mark the assistant's part for training."""

    tags = {"generation"}  # noqa: RUF012  # the name and type Jinja asks for

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Put the marked part in the place of the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class PlainNamespace(Namespace):
    """``namespace()`` without names that Python could take for its own."""

    def __init__(self, /, *args: Any, **kwargs: Any) -> None:
        """Take the first attributes as dict() does."""
        for name in dict(*args, **kwargs):
            _check_name(name)
        super().__init__(*args, **kwargs)

    def __setitem__(self, name: str, value: Any) -> None:
        """Set an attribute, for ``{% set ns.name = value %}``."""
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"namespace: {name!r} cannot be the name of an attribute")


def raise_exception(message: object) -> None:
    """End the rendering, for templates."""
    raise RejectionError(str(message))


def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    """Python's dict() without the methods of its type, for templates."""
    return dict(*args, **kwargs)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models are trained on it: nothing escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


@functools.cache
def environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, with fewer globals."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    env.filters["tojson"] = tojson
    env.globals.clear()
    env.globals.update(
        range=safe_range,
        dict=make_dict,
        namespace=PlainNamespace,
        raise_exception=raise_exception,
    )
    return env


@functools.lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    """A template, kept for the next turn of its chat."""
    return environment().from_string(source)


def render(template: Template, variables: Mapping[str, Any], limit: int) -> str:
    """The rendered text, of at most ``limit`` bytes of UTF-8."""
    pieces, size = [], 0
    for piece in template.generate(variables):
        pieces.append(piece)
        size += len(piece)
        if size <= limit and not piece.isascii():
            size += len(piece.encode("utf-8", "surrogatepass")) - len(piece)
        if size > limit:
            raise OverflowError(f"it renders to more than {limit} bytes")
    return "".join(pieces)


def answer(line: str, limit: int) -> dict[str, Any]:
    """The reply to one request."""
    try:
        request = json.loads(line)
        template = compiled(request["template"])
        now = datetime.fromtimestamp(request["now"]) if request["now"] else datetime.now()
        clock = {"strftime_now": now.strftime}  # one time for all contexts
        return {"texts": [render(template, clock | c, limit) for c in request["contexts"]]}
    except RejectionError as error:
        return {"rejected": one_line(error)}
    except MemoryError:
        return {"failed": "it needs too much memory"}
    except Exception as error:  # whatever a program may raise
        return {"failed": f"{type(error).__name__}: {one_line(error)}"}


def one_line(error: Exception) -> str:
    """An error's message, safe to print whatever the template put into it."""
    text = "".join(c if c.isprintable() else " " for c in str(error)[:1000])
    return " ".join(text.split())[:200]


def confine(megabytes: int) -> None:
    """Give up memory beyond a limit, and all writing to files, where the system can enforce it."""
    try:
        import resource  # noqa: PLC0415  # Unix only
    except ImportError:
        return
    for kind, wanted in (
        (resource.RLIMIT_AS, megabytes * 2**20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, most = resource.getrlimit(kind)
        value = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(kind, (value, value))


def main(seconds: float, megabytes: int, limit: int) -> None:
    """Answer requests until the input ends or a request takes longer than ``seconds``."""
    confine(megabytes)
    sys.stdout.write(READY)
    sys.stdout.flush()
    with Path(os.devnull).open("w") as nowhere:
        for line in sys.stdin:
            # A thread of C that needs no lock of Python's: it ends the process in any loop.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            reply = json.dumps(answer(line, limit))
            faulthandler.cancel_dump_traceback_later()
            sys.stdout.write(reply + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
