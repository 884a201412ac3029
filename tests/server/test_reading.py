"""From an answer's text to events, however the text is cut into pieces."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobit.server.parsing.events import Answer, CallArguments, Event, Reasoning, Text, gathered
from isobit.server.parsing.reading import AnswerReader, Dialect
from isobit.server.parsing.thinking import Thinking, found
from isobit.server.tool_calls.harmony import Harmony
from isobit.server.tool_calls.llama import Llama
from isobit.server.tool_calls.tagged import Hermes, QwenXml
from isobit.server.tool_calls.tools import Tool

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
SPECIAL = dict(enumerate(TAGS))
TOOL = Tool(
    "f",
    {
        "type": "object",
        "properties": {
            "text": {"type": "string"},
            "n": {"type": "integer"},
            "x": {"type": ["number", "null"]},
            "on": {"type": "boolean"},
            "list": {"type": "array"},
            "any": {"$ref": "#/$defs/any"},
        },
        "$defs": {"any": {"anyOf": [{"type": "string"}, {"type": "object"}]}},
    },
)
Pieces = list[tuple[str, bool]]
"""Text, and whether it is a token of its own that is a tag."""


def pieces_of(text: str) -> Pieces:
    """A text in which ``«`` and ``»`` stand around tags that are tokens."""
    out: Pieces = []
    for n, part in enumerate(text.replace("»", "«").split("«")):
        out.append((part, n % 2 == 1))
    return out


def read(
    pieces: Pieces,
    cuts: list[int],
    dialect: Dialect | None,
    thinking: Thinking | None,
    *,
    special: dict[int, str] = SPECIAL,
    one_call: bool = False,
    cut: bool = False,
) -> list[Event]:
    """The events of a text that comes cut after so many characters, again and again."""
    reader = AnswerReader(special, thinking, dialect, one_call=one_call)
    offset = 0
    for text, is_tag in pieces:
        if is_tag:
            reader.mark(offset)
        offset += len(text)
    text, events = "".join(text for text, _ in pieces), []
    while text:
        n = cuts.pop(0) if cuts else len(text)
        events += reader.push(text[:n])
        text = text[n:]
    return events + reader.flush(cut=cut)


def answer(
    text: str, dialect: Dialect | None, thinking: Thinking | None = None, **settings: Any
) -> Answer:
    whole = gathered(read(pieces_of(text), [], dialect, thinking, **settings))
    each = gathered(read(pieces_of(text), [1] * len(text), dialect, thinking, **settings))
    for call in (*whole.calls, *each.calls):
        call.id = ""
    assert whole == each
    return whole


def calls(found: Answer) -> list[tuple[str, Any, bool]]:
    return [(c.name, json.loads(c.arguments), c.complete) for c in found.calls]


HERMES, XML, LLAMA = Hermes([TOOL]), QwenXml([TOOL]), Llama([TOOL])
BEGUN = Thinking("<think>", "</think>", begun=True)
MAYBE = Thinking("<think>", "</think>", begun=None)


@pytest.mark.parametrize(
    ("text", "thinking", "reasoning", "said"),
    [
        ("«<think>»\nHm.\n\n«</think>»\n\nYes.\n", MAYBE, "Hm.", "Yes.\n"),
        ("\nHm. «</think>»Yes.", BEGUN, "Hm.", "Yes."),
        ("Hm", BEGUN, "Hm", ""),
        ("  Yes.", MAYBE, "", "  Yes."),
        ("<think> is a tag", MAYBE, "", "<think> is a tag"),
        ("«<think>»Say </think>, <think>.«</think>»", MAYBE, "Say </think>, <think>.", ""),
        ("«<think>»«</think>»\n", MAYBE, "", ""),
        ("A «<think>»b«</think>»", MAYBE, "", "A <think>b</think>"),
        ("«<think>»a«</think>»b", None, "", "<think>a</think>b"),
    ],
)  # fmt: skip
def test_thinking(text: str, thinking: Thinking | None, reasoning: str, said: str) -> None:
    for dialect in (None, HERMES, XML, LLAMA):
        got = answer(text, dialect, thinking)
        assert (got.reasoning, got.text) == (reasoning, said)
        assert not got.calls


def test_tags_that_are_no_tokens_are_read_as_text_is() -> None:
    got = answer("<think>a</think>b", None, MAYBE, special={})
    assert (got.reasoning, got.text) == ("a", "b")


@pytest.mark.parametrize(
    ("ending", "begun"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("assistant\n<think>\n\n</think>\n\n", False),
        ("assistant\n", None),
    ],
)
def test_how_a_prompt_ends_says_whether_thinking_has_begun(ending: str, begun: bool | None) -> None:
    got = found("… '<think>' … '</think>' …", f"<think> {ending}")
    assert got == Thinking("<think>", "</think>", begun)
    assert found("no tags", ending) is None


ODD = 'a "b" </tool_call> {\\n} \\ </parameter> <tool_call> \u2028 日本 \x07 }\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "f", "arguments": {"n": 1}}', {"n": 1}),
        ('{"name":"f","arguments":{"n":1,"list":[[],{}]}}', {"n": 1, "list": [[], {}]}),
        ('{"arguments": {"n": 1}, "name": "f"}', {"n": 1}),
        ('{"id": [1, {"name": "x"}], "name": "f", "parameters": {"n": 1}}', {"n": 1}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": ""}', {}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f", "arguments": "{\\"n\\": 1}"}', {"n": 1}),
        ('{"name": "f", "arguments": {"text": "a\nb\t \x01"}}', {"text": "a\nb\t \x01"}),
        (json.dumps({"name": "f", "arguments": {"text": ODD}}), {"text": ODD}),
        (json.dumps({"name": "f", "arguments": {"text": ODD}}, ensure_ascii=False), {"text": ODD}),
    ],
)  # fmt: skip
def test_calls_in_json(text: str, expected: object) -> None:
    for blank in ("", "\n"):
        got = answer(f"«<tool_call>»{blank}{text}{blank}«</tool_call>»\n", HERMES)
        assert calls(got) == [("f", expected, True)]
        assert got.text == ""
    got = answer(text, LLAMA)
    begins = text.startswith('{"name"')  # without a tag, that is what tells a call
    assert calls(got) == ([("f", expected, True)] if begins else [])
    assert got.text == ("" if begins else text)


def test_text_thinking_and_calls_in_turn() -> None:
    call = '«<tool_call>»\n{"name": "f", "arguments": {"n": %d}}\n«</tool_call>»'
    text = f"«<think>»Hm.«</think>»\n\nFirst.\n\n{call % 1}\n{call % 2}\n\nThen.\n{call % 3} End. "
    got = answer(text, HERMES, MAYBE)
    assert got.reasoning == "Hm."
    assert got.text == "First.Then.End. "
    assert calls(got) == [("f", {"n": n}, True) for n in (1, 2, 3)]
    got = answer(text, HERMES, MAYBE, one_call=True)
    assert got.text == "First."
    assert calls(got) == [("f", {"n": 1}, True)]
    got = answer('{"name": "f", "parameters": {}}; {"name": "f", "parameters": {"n": 2}}', LLAMA)
    assert calls(got) == [("f", {}, True), ("f", {"n": 2}, True)]


@pytest.mark.parametrize(
    "text",
    [
        "I could write «<tool_call>» here.",
        "«<tool_call>»\n{'name': 'f'}\n«</tool_call>»",
        "«<tool_call>»\n[]\n«</tool_call>»",
        '«<tool_call>»\n{"nam',
        "«<tool_call>»",
        "<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>",
        "Text <tool",
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(text: str) -> None:
    got = answer(text, HERMES)
    assert not got.calls
    assert got.text == text.replace("«", "").replace("»", "")


@pytest.mark.parametrize(
    "text",
    [
        'Look: {"name": "f", "parameters": {}}',
        '{"name": "other", "parameters": {}}',
        '{"answer": 1}',
        "{}",
        '{"name": "f',
        '{"parameters": {}, "name": "f"}',
        '{"na me": 1, "name": "f", "parameters": {}}',
        '{"n\\u0061me": "f", "parameters": {}}',
        '{"type": "other", "name": "f", "parameters": {}}',
        " ; ",
        "[1]",
    ],
)
def test_what_is_no_call_of_llama_is_text(text: str) -> None:
    got = answer(text, LLAMA)
    assert not got.calls
    assert got.text == text


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "f", "arguments": {"n": 1',
        '{"name": "f", "arguments": {"text": "abc',
        '{"name": "f", "arguments": {"n": 1«</tool_call>»',
    ],
)
def test_a_call_that_is_cut_is_not_complete(text: str) -> None:
    got = answer(f"«<tool_call>»{text}", HERMES)
    [call] = got.calls
    assert not call.complete
    assert text.split('"arguments": ')[1].removesuffix("«</tool_call>»") == call.arguments


def xml(**arguments: str) -> str:
    each = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"«<tool_call>»\n<function=f>\n{each}</function>\n«</tool_call>»"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"text": "a\nb"}, {"text": "a\nb"}),
        ({"text": " a \n\n"}, {"text": " a \n\n"}),
        ({"text": ""}, {"text": ""}),
        ({"text": "12"}, {"text": "12"}),
        ({"text": '"quoted" \\ {'}, {"text": '"quoted" \\ {'}),
        ({"text": ODD, "n": "3"}, {"text": ODD, "n": 3}),
        ({"text": "a\n</parameter> b"}, {"text": "a\n</parameter> b"}),
        ({"n": "-12", "x": "1.5", "on": "true"}, {"n": -12, "x": 1.5, "on": True}),
        ({"n": "12.0", "x": "null", "on": "False"}, {"n": 12, "x": None, "on": False}),
        ({"n": "twelve", "x": "NaN", "on": "1"}, {"n": "twelve", "x": "NaN", "on": "1"}),
        ({"list": "[1, {}]"}, {"list": [1, {}]}),
        ({"list": "['a', None]"}, {"list": ["a", None]}),
        ({"list": "__import__('os')"}, {"list": "__import__('os')"}),
        ({"any": '{"a": 1}'}, {"any": {"a": 1}}),
        ({"any": "[1]"}, {"any": "[1]"}),
        ({"unknown": "1"}, {"unknown": "1"}),
    ],
)
def test_calls_in_tags(given: dict[str, str], expected: object) -> None:
    text = xml(**given)
    for dialect in (HERMES, XML):
        assert calls(answer(text, dialect)) == [("f", expected, True)]
    bare = text.removeprefix("«<tool_call>»\n").replace("\n«</tool_call>»", "«</tool_call>»")
    assert calls(answer(bare, XML)) == [("f", expected, True)]
    both = answer(f"Do it.\n{text}\n{text}", XML)
    assert both.text == "Do it."
    assert calls(both) == [("f", expected, True)] * 2


def test_a_value_that_comes_twice_counts_once() -> None:
    twice = xml(n="1").replace("</function>", "<parameter=n>\n2\n</parameter>\n</function>")
    [call] = answer(twice, XML).calls
    assert call.arguments == '{"n": 1}'


def test_calls_in_tags_that_are_cut() -> None:
    text = xml(text="abc", n="12")
    for end in range(text.index("=f>") + 3, text.index("</function>") + 5):
        [call] = answer(text[:end], XML).calls
        assert not call.complete


def test_arguments_come_before_the_call_is_whole() -> None:
    begin = pieces_of('«<tool_call>»{"name": "f", "arguments": {"text": "a long')
    events = read(begin, [12], HERMES, None)
    assert CallArguments(0, '{"text": "a long') in events
    begin = pieces_of("«<tool_call>»<function=f>\n<parameter=text>\na long")
    assert CallArguments(0, '{"text": "a long') in read(begin, [12], XML, None)


HARMONY = Harmony()
HEADS = dict(enumerate(HARMONY.tags))


def harmony(text: str) -> Answer:
    """``text`` has its tags as tokens; the answer without them being so must not be a call."""
    marked = re.sub(r"(<\|\w+\|>)", r"«\1»", text)
    return answer(marked, HARMONY, special=HEADS)


ANALYSIS = "<|channel|>analysis<|message|>Hm, to=functions.f?<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
TOLD = "<|channel|>commentary<|message|>"
HEAD = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


@pytest.mark.parametrize(
    ("text", "reasoning", "said", "called"),
    [
        (f"{ANALYSIS}{FINAL}Yes.", "Hm, to=functions.f?", "Yes.", []),
        (f"{FINAL}Yes.<|return|>", "", "Yes.", []),
        (f"{ANALYSIS}{HEAD}{{}}<|call|>", "Hm, to=functions.f?", "", [{}]),
        (HEAD + json.dumps({"text": ODD}), "", "", [{"text": ODD}]),
        (f"{TOLD}I call.<|end|><|start|>assistant{HEAD}{{}}", "", "I call.", [{}]),
        (" to=functions.f<|channel|>commentary json<|message|>{}", "", "", [{}]),
        ("<|channel|>analysis<|message|>Hm", "Hm", "", []),
        ("<|channel|>anal", "", "", []),
        (f"{FINAL}A<|end|><|start|>assistant{FINAL}B", "", "A\n\nB", []),
        ("Without heads.", "", "Without heads.", []),
        ("", "", "", []),
    ],
)  # fmt: skip
def test_messages_with_heads(text: str, reasoning: str, said: str, called: list[Any]) -> None:
    got = harmony(text)
    assert (got.reasoning, got.text) == (reasoning, said)
    assert calls(got) == [("f", arguments, True) for arguments in called]


def test_a_call_with_a_head_that_is_cut() -> None:
    [call] = harmony(f'{HEAD}{{"text": "ab').calls
    assert (call.arguments, call.complete) == ('{"text": "ab', False)


ARGUMENTS = '{"text": "a{1}", "n": 12}'
JSON_CALL = f'{{"name": "f", "parameters": {ARGUMENTS}}}'
XML_CALL = "Do it." + xml(text="a{1}", n="12")


@pytest.mark.parametrize(
    ("dialect", "text", "special"),
    [
        (HERMES, f"Do it.\n\n«<tool_call>»\n{JSON_CALL}\n«</tool_call>»", SPECIAL),
        (HERMES, f"Do it.\n\n«<tool_call>»\n{JSON_CALL}\n«</tool_call>»", {}),
        (XML, XML_CALL, SPECIAL),
        (XML, XML_CALL, {}),
        (XML, re.sub("«.*»", "", XML_CALL), {}),
        (LLAMA, f"{JSON_CALL}; {JSON_CALL}", {}),
        (HARMONY, f"{FINAL}Do it.<|end|><|start|>assistant{HEAD}{ARGUMENTS}<|call|>", HEADS),
    ],
)
def test_of_a_call_that_max_tokens_cut_no_markup_is_said(
    dialect: Dialect, text: str, special: dict[int, str]
) -> None:
    text = re.sub(r"(<\|\w+\|>)", r"«\1»", text)
    bare = re.sub("[«»]", "", text)
    for end in range(len(bare) + 1):
        pieces, left = list[tuple[str, bool]](), end
        for part, tag in pieces_of(text):
            if tag and special and left < len(part):
                break  # a token comes whole
            pieces.append((part[:left], tag))
            left -= len(pieces[-1][0])
        got = gathered(read(pieces, [1] * end, dialect, MAYBE, special=special, cut=True))
        assert "Do it.".startswith(got.text.rstrip()), bare[:end]
        for call in got.calls:
            assert ARGUMENTS.startswith(call.arguments), bare[:end]


def test_what_may_have_been_a_tag_is_text_if_the_model_ended_there() -> None:
    for cut, said in ((False, "a <tool"), (True, "a")):
        got = gathered(read([("a <tool", False)], [], HERMES, None, special={}, cut=cut))
        assert got.text.rstrip() == said
    for cut, said in ((False, "<thi"), (True, "")):
        got = gathered(read([("\n<thi", False)], [], None, MAYBE, special={}, cut=cut))
        assert got.text.strip() == said


WORDS = st.sampled_from(
    [
        *TAGS,
        *HARMONY.tags,
        *("analysis", "final", "assistant", "commentary to=functions.f "),
        *("<tool", "_call>", "<", "\n", " ", "\\", '"', "{", "}", ",", ":", "[", "]", "; ", "1"),
        *('{"name": "f"', ', "arguments": ', '{"text": "', '"}', '{"n": 1}', "null", "x", "日"),
        *(
            "<function=f>\n",
            "<function=",
            "<parameter=text>\n",
            "<parameter=n>",
            "\n</parameter>\n",
        ),
        *(
            "</parameter>",
            "</function>",
            "</",
            "parameter>",
            ">",
            '{"name": "f", "parameters": {}}',
        ),
    ]
)
TEXTS = st.lists(st.tuples(WORDS, st.booleans()), max_size=25).map(
    lambda words: [(text, tag and text in (*TAGS, *HARMONY.tags)) for text, tag in words]
)


@given(
    TEXTS,
    st.lists(st.integers(1, 9), max_size=60),
    st.sampled_from([HERMES, XML, LLAMA, HARMONY, None]),
    st.sampled_from([BEGUN, MAYBE, None]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_pieces_joined_are_the_whole(
    pieces: Pieces,
    cuts: list[int],
    dialect: Dialect | None,
    thinking: Thinking | None,
    tokens: bool,
    one_call: bool,
    cut: bool,
) -> None:
    special = dict(enumerate((*TAGS, *HARMONY.tags))) if tokens else {}
    settings = {"special": special, "one_call": one_call, "cut": cut}
    whole = gathered(read(pieces, [], dialect, thinking, **settings))
    parts = gathered(read(pieces, cuts, dialect, thinking, **settings))
    each = gathered(read(pieces, [1] * 400, dialect, thinking, **settings))
    for got in (whole, parts, each):
        for call in got.calls:
            call.id = ""
    assert whole == parts == each


@given(TEXTS)
def test_text_without_tags_is_left_as_it_is(pieces: Pieces) -> None:
    text = "".join(text for text, _ in pieces)
    events = read(pieces, [3] * 200, None, None)
    assert "".join(event.text for event in events if isinstance(event, Text)) == text
    assert not any(isinstance(event, Reasoning) for event in events)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=5), v, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), st.booleans())
def test_any_arguments_come_as_they_were(arguments: dict[str, Any], ascii_: bool) -> None:
    text = json.dumps({"name": "f", "arguments": arguments}, ensure_ascii=ascii_)
    pieces = [("<tool_call>", True), (f"\n{text}\n", False), ("</tool_call>", True)]
    for cuts in ([], [1] * 4000):
        got = gathered(read(list(pieces), cuts, HERMES, None))
        assert calls(got) == [("f", arguments, True)]


@given(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"))
    .map(lambda t: t.replace("</parameter>", "")), st.integers(), st.integers(1, 7)
)  # fmt: skip
def test_any_text_comes_as_it_was(text: str, n: int, cut: int) -> None:
    pieces = pieces_of(xml(text="@", n=str(n)))
    pieces = [(part.replace("@", text), tag) for part, tag in pieces]
    got = gathered(read(pieces, [cut] * 4000, XML, None))
    assert calls(got) == [("f", {"text": text, "n": n}, True)]
