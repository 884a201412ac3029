"""Messages reach a template as transformers prepares them; what is at fault is named."""

import dataclasses
import enum
import json
import random

import numpy as np
import pydantic
import pytest
import tokenizers

from isobit.errors import IsobitError, ModelRefused, UsageError
from isobit.text.conversation import forms, left_out, normalised
from isobit.text.messages import REASONING
from isobit.text.template import render_chat
from tests.helpers.expected import needs

SHOW = (  # all that a template can see
    "{% for m in messages %}{% for k, v in m.items() | sort %}{{ k }}={{ v | tojson }};{% endfor %}"
    "\n{% endfor %}{{ tools | tojson }}{{ documents | tojson }}{{ enable_thinking is defined }}"
    "{{ documents is defined }}{{ add_generation_prompt }}"
)


@pytest.fixture(scope="module")
def reference():
    return needs("transformers", "transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE())
    )


@dataclasses.dataclass
class Message:
    role: str
    content: str | None
    tool_calls: list | None = None


class Answer(pydantic.BaseModel):
    role: str
    content: str | None
    refusal: str | None = None
    thinking: str | None = None


FUNCTION = {"name": "weather", "arguments": {"city": "Köln", "days": None}}
CONVERSATIONS = {
    "keys that are None": [
        {"role": "user", "content": "a", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [{"function": FUNCTION, "id": None}]},
        {"role": "assistant", "content": "b", "tool_calls": None, "refusal": None},
    ],
    "reasoning": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning": "r"},
        {"role": "assistant", "content": "b", "thinking": "t"},
        {"role": "assistant", "content": "b", "reasoning_content": "c", "thinking": "t"},
        {"role": "assistant", "content": "b", "reasoning": "r", "thinking": None},
        {"role": "assistant", "content": "b", "reasoning": ""},
    ],
    "objects": [
        Message("user", "a"),
        Message("assistant", None, [{"function": FUNCTION}]),
        Answer(role="assistant", content="b", thinking="t"),
    ],
    "numbers of NumPy": [{"role": "user", "content": "a", "n": np.int64(3), "b": np.bool_(False)}],
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_prepared_as_transformers_does(reference, name):
    messages = CONVERSATIONS[name]
    for variables in (
        {},
        {"documents": [{"title": "t", "text": "x"}], "tools": [{"function": FUNCTION}]},
        {"enable_thinking": False, "documents": []},
    ):
        expected = reference.apply_chat_template(
            messages, chat_template=SHOW, tokenize=False, add_generation_prompt=True, **variables
        )
        assert render_chat(SHOW, messages, **variables) == expected


def test_the_callers_messages_stay_as_they_are():
    for messages in CONVERSATIONS.values():
        before = repr(messages)
        render_chat(SHOW, messages)
        assert repr(messages) == before


PARTS = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
KNOWS_PARTS = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (KNOWS_PARTS, "[one][two]"),
        ("{{ messages[0].content }}", "one\ntwo"),  # would print the list as Python has it
        ("{{ messages[0].content + '!' }}", "one\ntwo!"),
        ("{% if messages[0].content.startswith('o') %}yes{% endif %}", "yes"),
    ],
)
def test_parts_of_content(template, expected):
    assert render_chat(template, [{"role": "user", "content": PARTS}]) == expected
    assert render_chat(KNOWS_PARTS, [{"role": "user", "content": "plain"}]) == "plain"


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, 5, None, ["x"]]
)
def test_parts_that_are_no_text_are_refused_by_message(part):
    messages = [{"role": "user", "content": "x"}, {"role": "user", "content": [*PARTS, part]}]
    with pytest.raises(UsageError, match=r"messages\[1\]: expected parts of text alone") as caught:
        render_chat(KNOWS_PARTS, messages)
    assert len(str(caught.value)) < 200


CALL = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}: "
END = "{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "from_text", "from_object"),
    [
        (  # knows both: each as it came
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
            "{{ c.function.arguments | tojson }}{% endif %}",
            'f: {"a":1}',
            'f: {"a": 1}',
        ),
        ("{{ c.function.arguments | tojson }}", 'f: {"a": 1}', 'f: {"a": 1}'),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }}{% endfor %}",)
        + ("f: a=1",) * 2,
    ],
)
def test_arguments_as_text(template, from_text, from_object):
    for arguments, expected in (('{"a":1}', from_text), ({"a": 1}, from_object)):
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        assert render_chat(CALL + template + END, messages) == expected


@pytest.mark.parametrize("arguments", ["no JSON", "[1]", "5", "[" * 100_000, ""])
def test_arguments_that_are_no_object_stay_text(arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    template = CALL + "{{ c.function.arguments | tojson }}" + END
    assert render_chat(template, messages) == "f: " + json.dumps(arguments)


def test_a_message_at_fault_is_named():
    template = "{% for m in messages %}{{ m.content.upper() ~ m.more.x }}{% endfor %}"
    good = {"role": "user", "content": "x", "more": {"x": 1}}
    bad = {"role": "user", "content": "x"}
    with pytest.raises(ModelRefused):  # it can render no message that is just one
        render_chat(template, [good, bad])
    template = "{% for m in messages %}{% if m.name %}{{ m.name.x.y }}{% endif %}{% endfor %}"
    for n in range(3):
        messages = [bad, bad, bad]
        messages[n] = {**bad, "name": "z"}
        with pytest.raises(UsageError, match=rf"^messages\[{n}\]: .*UndefinedError"):
            render_chat(template, messages)


def test_variables_at_fault_are_named():
    with pytest.raises(UsageError, match=r"^tools, documents or variables: .*Undefined"):
        render_chat(
            "{% if tools %}{{ tools[0].a.b.c }}{% endif %}", [Message("user", "x")], tools=[{}]
        )
    for wrong in (5, "x", [5], {}, [["x"]]):
        with pytest.raises(UsageError, match=r"^tools: expected"):
            render_chat("", [Message("user", "x")], tools=wrong)
        with pytest.raises(UsageError, match=r"^documents: expected"):
            render_chat("", [Message("user", "x")], documents=wrong)
    with pytest.raises(UsageError, match=r"^thing: expected JSON types, found set"):
        render_chat("", [Message("user", "x")], thing=set())


class Role(str, enum.Enum):  # noqa: UP042 - a StrEnum writes itself as its value
    USER = "user"


class Size(enum.IntEnum):
    SMALL = 3


def test_members_of_enumerations_are_their_values():
    """Not "Role.USER", which is what str() makes of one."""
    messages = [{"role": Role.USER, "content": "x", "n": Size.SMALL, Role.USER: 1}]
    template = "{{ messages[0].role == 'user' }} {{ messages | tojson }}"
    expected = 'True [{"role": "user", "content": "x", "n": 3, "user": 1}]'
    assert render_chat(template, messages) == expected


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({(1, 2): "x"}, r"texts as keys, found \(1, 2\)"),
        ({"x": {("a",): 1}}, r"texts as keys, found \('a',\)"),
        ({"n": 10**5000}, "numbers that JSON can hold, found an integer of 16610 bits"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_message(more, found):
    for read in (lambda m: render_chat("", m), normalised):
        with pytest.raises(UsageError, match=rf"^messages\[1\]: expected {found}$"):
            read([Message("user", "x"), {"role": "user", "content": "x", **more}])
    call = {"function": {"name": "f", "arguments": more}}
    with pytest.raises(UsageError, match=rf"^messages\[0\]: expected {found}$"):
        normalised([{"role": "assistant", "tool_calls": [call]}])


def test_messages_are_read_by_one_function():
    for wrong, found in (
        ([], r"messages: expected a list of at least one message, found \[\]"),
        ([5], r'messages\[0\]: expected a mapping with a "role", found 5'),
        ([{"content": "x"}], r"messages\[0\].role: expected a text, found nothing"),
    ):
        for read in (lambda m: render_chat("", m), normalised):
            with pytest.raises(UsageError, match=f"^{found}$"):
                read(wrong)


def test_reasoning_that_is_no_text_is_left_out_by_any_name():
    for name in REASONING:
        [message] = normalised([{"role": "assistant", "content": "x", name: [{"text": "hm"}]}])
        assert name not in message


class Watched(str):
    """A prompt that counts how many of its characters were looked at."""

    seen = 0

    def find(self, text, start=0):
        found = super().find(text, start)
        self.seen += (len(self) if found < 0 else found) - start
        return found

    def __contains__(self, text):
        return self.find(text) >= 0


def test_texts_are_looked_for_where_the_last_was_found():
    said = normalised([{"role": "user", "content": f"number {i}."} for i in range(1000)])
    prompt = Watched("\n".join(m["content"] for m in said))
    assert left_out(said, prompt) is None
    assert prompt.seen < 2 * len(prompt)
    assert left_out(said[::-1], prompt) is None  # in another order they are there all the same
    assert left_out([*said, {"role": "user", "content": "more"}], prompt) == 1000


def test_a_text_is_there_as_json_writes_it_too():
    said = normalised([{"role": "user", "content": 'é"\n!'}])
    for prompt, missing in (
        ('<é"\n!>', None),
        ('<é\\"\\n!>', None),
        ('<\\u00e9\\"\\n!>', None),
        ('<e\\"\\n!>', 0),
    ):
        assert left_out(said, prompt) == missing


def test_forms_that_say_the_same():
    call = {"function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": "t", "tool_calls": [call, call]}
    systems = [{"role": "system", "content": text} for text in "ab"]
    said = normalised([*systems, {"role": "user", "content": "x"}, answer])
    whole, merged, merged_apart, apart = forms(said)
    assert whole == said
    assert merged == [{"role": "system", "content": "a\n\nb"}, *said[2:]]
    contents = [(m["content"], len(m.get("tool_calls", ()))) for m in merged_apart]
    assert contents == [("a\n\nb", 0), ("x", 0), ("t", 0), ("", 1), ("", 1)]
    assert apart == [*said[:2], *merged_apart[1:]]
    plain = normalised([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}])
    assert [*forms(plain)] == [plain]


def test_thinking_may_be_left_out_of_answers_alone():
    thought = "<think>hm</think>yes"
    for role, closes, missing in (
        ("assistant", "</think>", None),
        ("assistant", "", 0),
        ("user", "</think>", 0),
    ):
        said = normalised([{"role": role, "content": thought}])
        assert left_out(said, "yes", closes) == missing


def test_any_messages_give_text_or_one_line():
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    values = [
        None,
        True,
        5,
        1.5,
        "x",
        "",
        [],
        {},
        [[]],
        PARTS,
        {"a": {}},
        b"x",
        {1},
        object(),
        Message,
    ]
    templates = [SHOW, KNOWS_PARTS, "{{ messages[0].content + 'x' }}", CALL + END]
    for _ in range(300):
        messages = [
            {
                rng.choice(["role", "content", "tool_calls", "reasoning", 5]): rng.choice(values)
                for _ in range(rng.randrange(4))
            }
            | ({"role": "user"} if rng.random() < 0.8 else {})
            for _ in range(rng.randrange(3))
        ]
        try:
            text = render_chat(rng.choice(templates), messages)
        except IsobitError as error:
            text = str(error)
            assert text.isprintable() and len(text) < 300, text  # noqa: PT018
        assert isinstance(text, str)
