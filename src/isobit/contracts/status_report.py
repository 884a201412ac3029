"""A status as a table, as JSON and as a page."""

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from typing import Any

from isobit.contracts import claims
from isobit.contracts.status import Row, Status
from isobit.errors import printable


def markdown(status: Status) -> str:
    """A table, what is not discharged and why, and the evidence."""
    lines = [f"## {_cell(status.name)} {status.version}", ""]
    lines += [f"Declared: {_cell(_declared(status))} Measured:", ""]
    lines.append("| obligation | " + " | ".join(status.backends) + " |")
    lines.append("|---" * (len(status.backends) + 1) + "|")
    for row in status.rows:
        cells = [row.state(b) or "" for b in status.backends]
        lines.append("| " + " | ".join([_cell(row.title()), *cells]) + " |")
    lines += ["", status.summary(), ""]
    lines += [line for said in _prompts(status) for line in (said, "")]
    open_ends = [
        _cell(f"- {b}, {row.id}, {t.test}: {t.state}: {t.why}")
        for b in status.backends
        for row in status.rows
        for t in row.cells.get(b, [])
        if t.state != "discharged"
    ]
    lines += [*open_ends, *([""] if open_ends else [])]
    lines += ["Evidence:", "", *([_cell(f"- {e}") for e in status.evidence] or ["- none"]), ""]
    return "\n".join(lines)


def _prompts(status: Status) -> list[str]:
    """What prompts did, where a class of divergence rests on it."""
    told = any(row.divergence for row in status.rows) or status.flips.flipped
    return [f"{str(status.flips).capitalize()}."] if told else []


def _declared(status: Status) -> str:
    """The status that the authors give, and what evidence says to it and to their stages."""
    claimed = status.declared
    said = claimed or "nothing"
    if denied := claims.denials(status, claimed):
        said += f", which the evidence denies: {claims.listed(denied)}"
    elif unseen := claims.missing(status, claimed):
        said += f", which the evidence does not show: {claims.listed(unseen)}"
    if stages := claims.denied_stages(status):
        said += f". Stages that it denies: {claims.listed(stages)}"
    return f"{said}."


def _cell(text: str) -> str:
    """One line, its control characters escaped; spaces stay, for two tokens may differ in nothing
    else."""
    line = " ".join(part.strip() for part in text.splitlines())
    return printable(line).replace("|", "\\|").replace("<", "&lt;")


def to_json(status: Status) -> dict[str, Any]:
    """Everything, in JSON's types."""
    return {
        "contract": status.name,
        "version": status.version,
        "declared": status.declared,
        "denied_by": claims.denials(status, status.declared),
        "not_shown": claims.missing(status, status.declared),
        "denied_stages": claims.denied_stages(status),
        "obligations": [
            {
                "id": row.id,
                "property": row.property,
                "divergence": row.divergence,
                "backends": {
                    b: {"state": row.state(b), "tests": [asdict(t) for t in row.cells[b]]}
                    for b in row.cells
                },
            }
            for row in status.rows
        ],
        "prompts": {"tried": status.flips.tried, "flipped": status.flips.flipped},
        "evidence": status.evidence,
    }


_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;width:100%}td,th{border:1px solid #ccc;padding:.4rem .6rem;
text-align:left;vertical-align:top;overflow-wrap:anywhere}
td p{margin:.2rem 0;font-size:.85em;color:#444;white-space:pre-wrap}
.discharged{background:#dff3e0}.failing{background:#f9d6d5}.stale{background:#fdf0c8}
@media(prefers-color-scheme:dark){body{background:#12151d;color:#e7eaf1}td,th{border-color:#333b4d}
td p{color:#98a2b8}.discharged{background:#1e3327}.failing{background:#4a2226}
.stale{background:#463a16}}
@media(max-width:600px){body{margin:1rem auto}table,tbody,tr,td{display:block}
tr{border:1px solid #8888;margin:0 0 .8rem}td{border:0}tr:first-child,td:empty{display:none}
td[data-of]::before{content:attr(data-of) ": ";font-weight:600}}"""


def html(statuses: Sequence[Status]) -> str:
    """One page that needs no network."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><title>Contracts</title>',
        f"<style>{_STYLE}</style><h1>Contracts</h1>",
    ]
    for s in statuses:
        heads = "".join(f"<th>{b}" for b in s.backends)
        parts.append(f"<h2>{escape(s.name)} {escape(s.version)}</h2>")
        parts.append(f"<p>Declared: {escape(_declared(s))} Measured:</p>")
        parts.append(f"<table><tr><th>obligation{heads}")
        for row in s.rows:
            cells = "".join(_html_cell(row, b) for b in s.backends)
            mark = f" <b>{escape(row.divergence)}</b>" if row.divergence else ""
            parts.append(f"<tr><td><b>{escape(row.id)}</b> {escape(row.property)}{mark}{cells}")
        parts.append("</table>")
        parts += [f"<p>{line}" for line in _prompts(s)]
        parts.append("<h3>Evidence</h3><ul>")
        parts += [f"<li>{escape(e)}" for e in s.evidence or ["none"]]
        parts.append("</ul>")
    return "\n".join(parts) + "\n"


def _html_cell(row: Row, backend: str) -> str:
    state = row.state(backend)
    if state is None:
        return "<td></td>"
    tests = "".join(f"<p>{escape(t.test)}: {escape(t.why)}</p>" for t in row.cells[backend])
    return f'<td class="{state}" data-of="{escape(backend)}">{state}{tests}</td>'
