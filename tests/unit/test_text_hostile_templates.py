"""Hostile chat templates end in one line of error: no code, no hang, no gigabytes."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from isobit.errors import ModelRefused, UsageError
from isobit.text import renderer, template
from isobit.text.renderer import Renderer
from isobit.text.template import CHATML, render_chat

USER = [{"role": "user", "content": "hello"}]
ECHO = "{{ messages[0].content }}"

# Each must end in an error of one line.
HOSTILE = {
    "string": "{{ 'a' * 10**10 }}",
    "list": "{{ ([1] * 10**10) | length }}",
    "shift by text": "{{ 'x' | center(10**10) }}",
    "percent": "{{ '%099999999999d' % 1 }}",
    "format": "{{ '{:99999999999d}'.format(1) }}",
    "format filter": "{{ '%99999999999s' | format('x') }}",
    "indent": "{{ [[1]] | tojson(indent=10**10) }}",
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "doubling": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "joining": "{% set n = namespace(x='aa') %}{% for i in range(99) %}"
    "{% set n.x = n.x.join(n.x) %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "recursion": "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "nesting": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "blocks": "{% if 1 %}" * 9999,
    "negations": "{{ " + "not " * 50000 + "1 }}",
    "size": "x" * (renderer.MAX_TEMPLATE + 1),
    "syntax": "{% for m in messages %}",
    "unknown tag": "{% exec %}",
    "unknown filter": "{{ 1 | nothing }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% from 'os' import path %}",
    "extends": "{% extends '/etc/passwd' %}",
    "class": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__()[0] }}",
    "globals": "{{ raise_exception.__globals__['os'].system('true') }}",
    "range globals": "{{ range.__globals__.os }}",
    "closure": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "self": "{{ self.__init__.__globals__.os }}",
    "loop": "{% for i in [1] %}{{ loop.__class__.__init__.__globals__ }}{% endfor %}",
    "format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "format through map": "{{ ['{0.__class__.__mro__}'] | map('format', 1) | list | first.x.y }}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "bound": "{{ strftime_now.__self__.__class__.__base__ }}",
    "namespace name": "{{ namespace(__class__=1) }}",
    "namespace item": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.y.z }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'role': 'system'}) }}",
    "undefined": "{{ nothing.at.all }}",
    "type": "{{ 'a' + 1 }}",
    "surrogate": "{{ nothing['\ud800'].x }}",
}

ENDLESS = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% endfor %}{% endfor %}",
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}"
    "{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(80) }}",
    "shared lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "power": "{{ 9**(9**(9**9)) }}",
    "digits": "{{ (7**9999999) % 10 }}{{ (7**99999999) % 10 }}",
}


def refused(source, messages=USER):
    with pytest.raises(ModelRefused) as caught:
        render_chat(source, messages)
    message = str(caught.value)
    assert message.startswith("chat template: ")
    assert message.isprintable()  # one line
    assert len(message) < 300
    return message


@pytest.fixture
def impatient(monkeypatch):
    """A renderer that stops a template after half a second."""
    mine = Renderer(seconds=0.5)
    monkeypatch.setattr(template, "RENDERER", mine)
    yield mine
    mine.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused(name):
    refused(HOSTILE[name])
    assert render_chat(ECHO, USER) == "hello"


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_are_stopped(impatient, name):
    assert "within 0.5 s" in refused(ENDLESS[name])
    assert render_chat(ECHO, USER) == "hello"


def test_messages_that_take_a_template_too_long_are_named(impatient):
    each = "{% for a in range(40) %}{% for b in range(9000) %}{% endfor %}{% endfor %}"
    source = "{% for m in messages %}" + each + "{% endfor %}"
    with pytest.raises(UsageError, match=r"^messages\S*: .* within 0.5 s"):
        render_chat(source, USER * 999)


SILENT = [
    "{{ '{0.__class__.__init__}'.format(namespace()) }}",
    "{{ ''['__class__'] }}",
    "{{ messages | attr('__class__') }}",
    "{{ messages | map(attribute='__class__') | list }}",
    "{{ (1).__class__ }}",
    "{{ lipsum }}{{ cycler }}{{ joiner }}{{ environment }}{{ os }}{{ __builtins__ }}",
]


@pytest.mark.parametrize("source", SILENT)
def test_internals_are_undefined(source):
    text = render_chat(source, USER)
    assert "<" not in text
    assert text.replace("Undefined", "").strip("[], ") == ""


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc on this system")
def test_the_renderer_has_no_environment_and_may_not_write():
    # For code that broke out of Jinja's sandbox there would be little to find.
    mine = Renderer()
    mine.render(ECHO, [{"messages": USER}])
    proc = Path(f"/proc/{mine._process.pid}")
    environment = [entry.split("=")[0] for entry in (proc / "environ").read_text().split("\0")]
    assert os.getsid(mine._process.pid) != os.getsid(0)  # Ctrl-C in a terminal is not for it
    [sizes] = [s for s in (proc / "limits").read_text().splitlines() if "Max file size" in s]
    mine.close()
    assert set(environment) <= {"PYTHONPATH", "TZ", ""}
    assert sizes.split()[3:5] == ["0", "0"]


def test_rendered_text_has_a_limit():
    assert "renders to more than" in refused("{{ 'x' * 5000000 }}")
    assert "renders to more than" in refused("{{ '\U0001f600' * 1500000 }}")  # in bytes
    long = [{"role": "user", "content": "x" * (renderer.MAX_BYTES // 2)}]
    with pytest.raises(UsageError, match=r"messages\[0\]: .* renders to more than"):
        render_chat("{{ messages[0].content * 3 }}", long)


def test_threads_get_their_own_text():
    with ThreadPoolExecutor(8) as pool:
        each = [[{"role": "user", "content": f"number {i}"}] for i in range(64)]
        texts = pool.map(lambda m: render_chat("{{ messages[0].content }}", m), each)
        assert list(texts) == [f"number {i}" for i in range(64)]


def test_a_process_that_something_ended_in_between_is_no_templates_fault():
    render_chat(CHATML, USER)
    process = renderer.RENDERER._process
    process.kill()
    process.wait()
    assert render_chat(ECHO, USER) == "hello"


class Interrupted:
    """A pipe that Ctrl-C hits before its reply is read."""

    def __init__(self, pipe):
        self.pipe = pipe

    def __getattr__(self, name):
        return getattr(self.pipe, name)

    def readline(self):
        raise KeyboardInterrupt


def test_an_interrupted_request_leaves_no_reply_behind():
    render_chat(CHATML, USER)
    process = renderer.RENDERER._process
    process.stdout = Interrupted(process.stdout)
    with pytest.raises(KeyboardInterrupt):
        render_chat("{{ 'stale' }}", USER)
    process.stdout = process.stdout.pipe
    assert render_chat("{{ 'fresh' }}", USER) == "fresh"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_renders_by_itself():
    render_chat(CHATML, USER)
    before = renderer.RENDERER._process.pid
    child = os.fork()
    if child == 0:
        good = render_chat("{{ 'mine' }}", USER) == "mine"
        os._exit(0 if good and renderer.RENDERER._process.pid != before else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert render_chat("{{ 'still' }}", USER) == "still"
    assert renderer.RENDERER._process.pid == before
