"""Messages, tools and variables of any kind: only the template makes control tokens."""

import functools
import random
from pathlib import Path
from typing import Any

from isobit.errors import UsageError
from isobit.text import renderer, template
from isobit.text.messages import template_variables
from isobit.text.template import CHATML, encode_chat, render_chat
from isobit.text.tokenizer import Tokenizer
from tests.unit.test_text_special import metadata

FOLDER = Path(__file__).parents[2] / "data" / "templates"
CONTROL = ["<|im_start|>", "<|im_end|>", "<pad>", "</s>", "<mask>"]
WORDS = [
    *CONTROL,
    "<|im_",
    "start|>",
    "</think>",
    "<think>",
    "|",
    "⠁",
    "a",
    "\n",
    "😀",
    "{{ 1 }}",
    "d",
]
WORDS += ["<tool_call>", "\x1b[0m", "é", "<ma", "sk>"]
CUTTING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content.split('</think>')[-1] | trim }}{{ m.content | replace('</think>', '') }}"
    "{{ m.content[1:] ~ m.content[::-1] }}<|im_end|>\n{% endfor %}"
)


@functools.lru_cache(maxsize=16)
def tokenizer(source: str) -> Tokenizer:
    special = dict.fromkeys(CONTROL, 3) | {"<think>": 4, "</think>": 4, "<tool_call>": 4}
    data = metadata(special) | {"tokenizer.chat_template": source}
    return Tokenizer.from_metadata(data, "m.gguf")


@functools.cache
def templates() -> list[str]:
    template.RENDERER = renderer.Renderer(seconds=5)
    return [CHATML, CUTTING, *(path.read_text() for path in sorted(FOLDER.glob("*.jinja")))]


def words(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randrange(8)))


def value(rng: random.Random, depth: int = 0) -> Any:
    match rng.randrange(12):
        case 0:
            return rng.choice([None, True, -1, 1.5, float("nan"), 10**30, b"x", {1}, object()])
        case 1 if depth < 4:
            return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
        case 2 if depth < 4:
            return {words(rng): value(rng, depth + 1) for _ in range(rng.randrange(4))}
        case 3:
            return [{"type": "text", "text": words(rng)}, rng.choice([words(rng), {"type": "x"}])]
        case 4:
            return "\ud800"
        case _:
            return words(rng)


def message(rng: random.Random) -> Any:
    roles = ["user", "assistant", "system", "tool", words(rng), None]
    out = {"role": rng.choice(roles), "content": words(rng) if rng.random() < 0.8 else value(rng)}
    if rng.random() < 0.2:
        arguments = rng.choice(['{"a": "<|im_end|>"}', "{", {"a": words(rng)}, value(rng)])
        function = {"name": words(rng), "arguments": arguments}
        out["tool_calls"] = rng.choice([[{"type": "function", "function": function}], value(rng)])
    if rng.random() < 0.2:
        out[rng.choice(["reasoning", "thinking", "name", words(rng)])] = value(rng)
    return out


def one(rng: random.Random) -> str:
    source = rng.choice(templates())
    tokens = tokenizer(source)
    messages = [message(rng) for _ in range(rng.randrange(5))]
    variables = {}
    if rng.random() < 0.2:
        variables["tools"] = (
            [value(rng)] if rng.random() < 0.5 else [{"function": {"name": words(rng)}}]
        )
    if rng.random() < 0.1:
        variables["enable_thinking"] = value(rng)
    ids = encode_chat(tokens, messages, **variables)
    eos = {"eos_token": "", "bos_token": ""}
    text = render_chat(source, messages, **variables, **eos)
    assert tokens.decode(ids) == text, "the text is another"
    # With nothing in them but letters, the same messages have as many control tokens.
    control = set(tokens.vocabulary.control.values())
    given = template_variables(messages, add_generation_prompt=True, **variables)
    for text in ("<|im_start|>", "<|im_end|>"):
        most = source.count(text) * (2 + 2 * len(given["messages"]))
        i = tokens.vocabulary.control[text]
        assert ids.count(i) <= most, f"{ids.count(i)} of {text}"
    others = control - {tokens.vocabulary.control[t] for t in ("<|im_start|>", "<|im_end|>")}
    assert others.isdisjoint(ids), "a message made a control token"
    return "encoded"


__all__ = ["UsageError", "one"]
