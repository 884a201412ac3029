"""Hostile Jinja: no code, no hang, no gigabytes; what a template may see is all it sees."""

import functools
import os
import random

from isobit.text import renderer, template
from isobit.text.template import encode_chat, render_chat
from tests.fuzz.targets.messages import tokenizer

SECRET = "topsecret-8f3a"
EXPRESSIONS = [
    *("messages", "messages[0]", "messages[0].content", "messages|length", "'a'", "'%s'", "1", "x"),
    *("10**9", "2**100", "-1", "none", "true", "nothing", "range(10)", "range(99999)", "f", "()"),
    *("dict(a=1)", "namespace(a=1)", "namespace()", "[1,2,3]", "{'a':1}", "strftime_now('%Y')"),
    *("loop", "self", "self._TemplateReference__context", "caller", "varargs", "raise_exception"),
    *("tools", "bos_token", "1e308", "''", "'\\ud800'", "cycler", "lipsum", "joiner", "config"),
    *("namespace", "dict", "range", "strftime_now", "''.format", "'a'.join"),
]
NAMES = [
    *("__class__", "__init__", "__globals__", "mro", "__mro__", "__subclasses__", "__dict__", "_x"),
    *("format", "format_map", "__getattribute__", "gi_frame", "f_globals", "__builtins__", "attr"),
    *("__call__", "__self__", "__func__", "__name__", "append", "update", "pop", "clear", "items"),
    *("keys", "upper", "encode", "translate", "join", "replace", "ljust", "zfill", "center"),
    *("expandtabs", "split", "environment", "__setitem__", "__code__", "tb_frame", "__reduce_ex__"),
]
FILTERS = [
    *("abs", "attr('__class__')", "batch(0)", "batch(-1)", "center(10**8)", "center(10**12)"),
    *(
        "default('x')",
        "dictsort",
        "escape",
        "filesizeformat",
        "first",
        "last",
        "float",
        "format(1)",
    ),
    *("groupby('a')", "indent(10**6)", "int(base=99)", "items", "join(',')", "length", "list"),
    *("map('upper')", "map(attribute='__class__')", "map('attr','__class__')", "max", "pprint"),
    *("random", "reject('eq',1)", "replace('a','b'*10**6)", "reverse", "round(10**6)", "safe"),
    *("select", "slice(0)", "slice(10**7)", "sort", "string", "striptags", "sum", "sum(start=[])"),
    *("title", "tojson", "tojson(indent=10**8)", "tojson(separators=1)", "trim", "truncate(-5)"),
    *("unique", "urlencode", "urlize", "wordwrap(0)", "wordwrap(1)", "xmlattr", "nosuch"),
]
OPERATORS = ["+", "-", "*", "/", "%", "**", "~", "==", "<", "in", "and"]
WHOLE = [
    *("'a' * 10**9", "[0] * 10**8", "'%0999999999d' % 1", "'{:>999999999}'.format(1)", "9**9**9"),
    *("'{0.__class__}'.format(1)", "10**10**8", "2**(10**7)", "(range(99999)|list)*1000"),
    *("'a'.ljust(10**10)", "('x'*1000000)|wordwrap(1)", "(1).__class__.__base__.__subclasses__()"),
    *("strftime_now('%' * 1000000)", "strftime_now.__self__", "namespace(**{'__class__': 1})"),
    *("'{a[__class__]}'.format_map({'a':1})", "''|attr('__class__')", "range.__globals__"),
]
PIECES = [
    *(
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
        "{% raw %}",
        "{#",
    ),
    *("{% from 'os' import system %}", "{% extends messages %}", "{% break %}", "}}", "{%", "\0"),
    *(
        "{% set messages.x = 1 %}",
        "{% set x, y = 1 %}",
        "{% debug %}",
        "{% generation %}",
        "\ud800",
    ),
    *(
        "{{ " + "[" * 500 + "]" * 500 + " }}",
        "{{ " + "-" * 3000 + "1 }}",
        "{{ x" + "|upper" * 1500 + " }}",
    ),
    *("{{ " + "not " * 5000 + "1 }}", "{% if 1 %}" * 200, "{{ x" + ".a" * 3000 + " }}"),
]


RARELY = 0.2
"""How often what has no end is one: it takes as long as a hundred others, and a new process."""


def expression(rng: random.Random, depth: int = 0) -> str:
    if depth > 3:
        return rng.choice(EXPRESSIONS)
    a, b = expression(rng, depth + 1), expression(rng, depth + 1)
    match rng.randrange(12):
        case 0:
            return f"({a}).{rng.choice(NAMES)}"
        case 1:
            return f"({a})['{rng.choice(NAMES)}']"
        case 2 | 3:
            return f"({a})|{rng.choice(FILTERS)}"
        case 4:
            return f"({a}) {rng.choice(OPERATORS)} ({b})"
        case 5:
            return f"({a})({b})"
        case 6:
            return f"({a}).{rng.choice(NAMES)}({b})"
        case 7:
            return f"({a})[{rng.choice(['0', '-1', '::-1', '10**9', '1:', '::0'])}]"
        case 8:
            return rng.choice(WHOLE)
        case _:
            return rng.choice(EXPRESSIONS)


def statement(rng: random.Random, depth: int = 0) -> str:
    e = expression(rng)
    if depth > 3:
        return "{{ " + e + " }}"
    body = "".join(statement(rng, depth + 1) for _ in range(rng.randrange(1, 3)))
    grown = rng.choice(["ns.a ~ ns.a", "[ns.a, ns.a]", "ns.a * 2", "ns.a + ns.a", e])
    n = rng.choice(["5", "50", "99999" if rng.random() < RARELY else "7"])
    match rng.randrange(12):
        case 0:
            return "{% for x in " + e + " %}" + body + "{% endfor %}"
        case 1 if rng.random() < RARELY:
            many = "{% for x in range(99999) %}"
            return many + many + body + "{% endfor %}{% endfor %}"
        case 2:
            return "{% macro f(a=1) %}" + body + "{{ f(" + e + ") }}{% endmacro %}{{ f() }}"
        case 3:
            loop = "{% for x in range(" + n + ") %}{% set ns.a = " + grown + " %}{% endfor %}"
            return "{% set ns = namespace(a=" + e + ") %}" + loop + "{{ ns.a }}"
        case 4:
            return "{% if " + e + " %}" + body + "{% else %}" + body + "{% endif %}"
        case 5:
            return "{% filter " + rng.choice(FILTERS) + " %}" + body + "{% endfilter %}"
        case 6:
            return rng.choice(PIECES)
        case _:
            return "{{ " + e + " }}"


@functools.cache
def impatient() -> None:
    os.environ["FUZZ_SECRET"] = SECRET
    template.RENDERER = renderer.Renderer(seconds=0.2, megabytes=512)


def one(rng: random.Random) -> str:
    impatient()
    source = "".join(statement(rng) for _ in range(rng.choice([1, 1, 2, 4])))
    said = [
        {"role": "user", "content": rng.choice(["hi", "a|b <|im_end|> {{ 7*7 }}", "\u2801" * 50])}
    ]
    if rng.random() < 0.5:
        text = render_chat(source, said)
        assert len(text.encode("utf-8", "surrogatepass")) <= 4 << 20, "too long"
        assert SECRET not in text and "root:x:0" not in text and "<module" not in text, text[:200]
        return "rendered"
    tokens = tokenizer(source) if len(source) < 1000 else tokenizer("x")
    assert all(0 <= i < tokens.vocab_size for i in encode_chat(tokens, said))
    return "encoded"
