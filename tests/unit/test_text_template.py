"""Chat templates are rendered as transformers renders them; messages are checked."""

import random
from pathlib import Path

import pytest

from isobit.errors import IsobitError, UsageError
from isobit.text import renderer
from isobit.text.template import CHATML, render_chat
from tests.helpers.expected import needs

# Templates of our own with the features that those of Qwen3, Qwen3-Coder and their kin use.
TEMPLATES = Path(__file__).parents[1] / "data" / "templates"


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": " <b>Weather</b> & wind | rain ",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Köln", "東京"], "default": None},
                    "days": {"type": ["integer", "null"], "minimum": 0, "nested": {"a": [1.5]}},
                },
                "required": ["city"],
            },
        },
    }
]

WORDS = ["Hi", "<think>\nhm\n</think>\n\nyes", "  x \n", "a|b", "é\u0301😁", "\n\n", '{"a": 1}']
WORDS += ["</think>", "<tool_response>a</tool_response>", "<|im_end|>\n<|im_start|>system\n", "⠁"]


def conversation(rng):
    messages = [{"role": "system", "content": rng.choice(WORDS)}] if rng.random() < 0.5 else []
    for _ in range(rng.randrange(1, 4)):
        messages.append({"role": "user", "content": rng.choice(WORDS) + rng.choice(WORDS)})
        answer = {"role": "assistant", "content": rng.choice(WORDS) + rng.choice(WORDS)}
        if rng.random() < 0.3:
            answer["reasoning_content"] = rng.choice(WORDS)
        messages.append(answer)
        if rng.random() < 0.4:
            arguments = {"city": rng.choice(WORDS), "days": rng.choice([1, None, {"x": "|"}])}
            call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
            answer["tool_calls"] = [call] * rng.randrange(1, 3)
            messages += [{"role": "tool", "content": rng.choice(WORDS)}] * len(answer["tool_calls"])
    if rng.random() < 0.6:
        messages.append({"role": "user", "content": rng.choice(WORDS)})
    return messages


@pytest.mark.parametrize("name", ["thinking", "coder", "others", "default"])
def test_rendered_as_transformers_does(name):
    module = needs("transformers", "transformers.utils.chat_template_utils")
    render = module.render_jinja_template
    source = CHATML if name == "default" else (TEMPLATES / f"{name}.jinja").read_text()
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    rendered = 0
    for _ in range(40):
        messages = conversation(rng)
        given = {
            "add_generation_prompt": rng.random() < 0.5,
            "tools": rng.choice([None, TOOLS]),
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
        }
        if rng.random() < 0.5:
            given["enable_thinking"] = rng.random() < 0.5
        try:
            [[expected], _] = render([messages], chat_template=source, **given)
        except Exception:
            with pytest.raises(IsobitError):
                render_chat(source, messages, **given)
        else:
            assert render_chat(source, messages, **given) == expected
            rendered += 1
    assert rendered > 2  # half of them, or more


USER = [{"role": "user", "content": "hello"}]


def test_a_template_may_refuse_messages():
    with pytest.raises(UsageError, match="refuses these messages: no \\[31mway") as caught:
        render_chat("{{ raise_exception('no \n\x1b[31mway') }}", USER)
    assert str(caught.value).isprintable()


BAD_MESSAGES = {
    "none": None,
    "empty": [],
    "text": "hello",
    "mapping": {"role": "user", "content": "hello"},
    "not mappings": ["hello"],
    "no role": [{"content": "hello"}],
    "role": [{"role": 5, "content": "hello"}],
    "no content": [{"role": "user"}],
    "content": [{"role": "user", "content": 5}],
    "bytes": [{"role": "user", "content": "x", "more": b"x"}],
    "object": [{"role": "user", "content": "x", "more": object()}],
    "set": [{"role": "user", "content": "x", "more": {1}}],
    "integer": [{"role": "user", "content": "x", "more": 10**5000}],
    "length": [{"role": "user", "content": "x" * (renderer.MAX_BYTES + 1)}],
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_malformed_messages_are_a_usage_error(name):
    with pytest.raises(UsageError, match=r"^messages") as caught:
        render_chat(CHATML, BAD_MESSAGES[name])
    assert len(str(caught.value)) < 200


def test_deep_messages_are_a_usage_error():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UsageError, match="messages"):
        render_chat(CHATML, [{"role": "user", "content": deep}])


def test_long_messages_are_rendered():
    long = "x|" * (renderer.MAX_BYTES // 4)
    assert render_chat("{{ messages[0].content }}", [{"role": "user", "content": long}]) == long
