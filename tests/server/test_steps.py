"""An answer is the same however its tokens fall into steps: stops, UTF-8, thinking, calls."""

import asyncio
import json
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isobit.runtime.detokenizer import StopText
from isobit.runtime.model import Model
from isobit.runtime.tokens import Token
from isobit.server.answer.choices import Choice, Piece
from isobit.server.openai.bodies import ChatShape, CompletionShape
from isobit.server.openai.completions import CompletionChunks
from isobit.server.openai.response_items import ResponseWriter
from isobit.server.openai.response_tools import Offer
from isobit.server.parsing.events import Answer, Finish, Text, gathered
from isobit.server.parsing.reading import AnswerReader
from isobit.server.parsing.thinking import Thinking
from isobit.server.tool_calls.tagged import Hermes, QwenXml
from isobit.server.tool_calls.tools import Tool

TOOLS = [Tool("f", {"properties": {"n": {"type": "integer"}, "text": {"type": "string"}}})]
DIALECTS = [None, Hermes(TOOLS), QwenXml(TOOLS)]
THINKING = [None, *(Thinking("<think>", "</think>", begun) for begun in (True, False, None))]
TEXTS = st.lists(
    st.sampled_from(
        [
            *("<think>", "\n</think>\n\n", "</think>", "<tool_call>", "</tool_call>", "\n", " "),
            *(
                '{"name": "f", "arguments": {"n": 1',
                ', "text": "日本',
                '"}}',
                "日",
                "👍🏽",
                "é",
                "end",
            ),
            *(
                "<function=f>",
                "<parameter=text>\n",
                "\n</parameter>\n",
                "</function>",
                "stop",
                "sto",
            ),
        ]
    ),
    max_size=12,
).map("".join)
STOPS = st.lists(st.sampled_from(["stop", "op", "\n\n", "</tool", "本", "👍", "nd"]), max_size=2)


class Stepwise:
    """An engine whose generation gives its tokens in steps of these sizes."""

    def __init__(self, model: Model, ids: list[int], sizes: list[int]) -> None:
        self.model = model
        self._left, self._sizes = deque(ids), deque(sizes)
        self._ready: deque[int] = deque()
        self.request = SimpleNamespace(prompt=[1], cached=0, generated=1)
        self.error = None

    def submit(self, *_args: Any, **_settings: Any) -> "Stepwise":
        return self

    @property
    def finish_reason(self) -> str | None:
        return None if self._left else "length"

    def take(self) -> Token | None:
        if self._ready:
            token = self._ready.popleft()
            return Token(token, -token / 8)
        if self._left:
            for _ in range(self._sizes.popleft() if self._sizes else len(self._left)):
                if self._left:
                    self._ready.append(self._left.popleft())
        return None

    def cancel(self) -> None: ...


def answer(
    model: Model, ids: list[int], sizes: list[int], dialect: Any, thinking: Any, stops: list[str]
) -> tuple[Answer, list[int], int, int, str]:
    async def run() -> list[Piece]:
        engine = Stepwise(model, ids, sizes)
        reader = AnswerReader({}, thinking, dialect, str)
        held = StopText(stops)
        choice = Choice(engine, 0, [1], None, None, stops=held, logprobs=None, of_prompt=False,
                        receipt=False, reader=reader)  # type: ignore  # fmt: skip
        pieces = list[Piece]()
        while not (pieces and pieces[-1].finish):
            if (piece := choice.piece()) is not None:
                pieces.append(piece)
        counts.extend((choice.n_tokens, choice.n_reasoning))
        return pieces

    counts: list[int] = []
    pieces = asyncio.run(run())
    assert all(piece.finish is None for piece in pieces[:-1])
    events = [event for piece in pieces for event in piece.events]
    assert sum(isinstance(event, Finish) for event in events) == 1
    found = gathered(events)
    tokens = [token.id for piece in pieces for token in piece.tokens]
    return found, tokens, counts[0], counts[1], response(model, pieces)


def response(model: Model, pieces: list[Piece]) -> str:
    """What ``/v1/responses`` writes, log-probabilities included."""
    journal = SimpleNamespace(created=0, name=lambda *of: "_".join(map(str, of)))
    answers: Any = SimpleNamespace(journal=journal, receipt=lambda _: {})
    offers = [Offer({"name": "f"}, "f")]
    writer = ResponseWriter(SimpleNamespace(model=model), {}, answers, offers, measured=True)  # type: ignore
    return "".join(event for piece in pieces for event in writer.piece(piece))


@settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    text=TEXTS,
    sizes=st.lists(st.integers(1, 4), max_size=80),
    dialect=st.sampled_from(DIALECTS),
    thinking=st.sampled_from(THINKING),
    stops=STOPS,
    ended=st.booleans(),
    cut=st.integers(0, 3),
)
def test_steps_do_not_change_an_answer(
    alone: Model,
    text: str,
    sizes: list[int],
    dialect: Any,
    thinking: Any,
    stops: list[str],
    ended: bool,
    cut: int,
) -> None:
    ids = alone.tokenizer.encode(text, special=False, bos=False)
    ids = ids[: len(ids) - cut]  # perhaps within a character
    if ended:
        ids.append(min(alone.stop_ids))
    asked = (dialect, thinking, stops)
    once = answer(alone, ids, [], *asked)
    assert answer(alone, ids, sizes, *asked) == once
    assert answer(alone, ids, [1] * len(ids), *asked) == once
    found = once[0]
    assert found.finish is not None
    assert (found.finish.stop in stops) == (found.finish.stop is not None)


@pytest.mark.parametrize("size", [1, 2, 50])
def test_a_stop_string_says_which_it_was(alone: Model, size: int) -> None:
    ids = alone.tokenizer.encode("one two three", special=False, bos=False)
    found, *_ = answer(alone, ids, [size] * 50, None, None, ["three", " tw"])
    assert found.text == "one"
    assert found.finish == Finish("stop", " tw")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.text("stop本\n日é", max_size=30),
    stops=st.lists(st.text("stop本\n", min_size=2, max_size=5), max_size=2),
)
def test_text_ends_before_the_first_stop_string(alone: Model, text: str, stops: list[str]) -> None:
    ids = alone.tokenizer.encode(text, special=False, bos=False)
    found, *_ = answer(alone, ids, [1] * len(ids), None, None, stops)
    # the first to be complete ends it; of several that are, the longest
    ends = min(((at + len(s), -len(s)) for s in stops if (at := text.find(s)) >= 0), default=None)
    assert found.text == (text if ends is None else text[: sum(ends)])


def test_every_token_of_a_text_has_its_log_probability(alone: Model) -> None:
    ids = alone.tokenizer.encode("a 日本 st", special=False, bos=False)
    assert len(ids) > len("a 日本 st")  # some are no whole character, and the last are held
    told = answer(alone, ids, [1] * len(ids), None, None, ["stop"])[-1]
    events = [json.loads(line[6:]) for line in told.split("\n") if line.startswith("data: ")]
    deltas = [e["logprobs"] for e in events if e["type"] == "response.output_text.delta"]
    [done] = [e["logprobs"] for e in events if e["type"] == "response.output_text.done"]
    assert done == [each for delta in deltas for each in delta]
    assert [each["logprob"] for each in done] == [-token / 8 for token in ids]


def test_thinking_and_calls_have_no_log_probabilities(alone: Model) -> None:
    parts = ["Hm</think>", "a", '<tool_call>{"name": "f", "arguments": {}}</tool_call>', "b"]
    ids = [alone.tokenizer.encode(part, special=False, bos=False) for part in parts]
    every = [token for each in ids for token in each]
    told = answer(alone, every, [], Hermes(TOOLS), THINKING[1], [])[-1]
    events = [json.loads(line[6:]) for line in told.split("\n") if line.startswith("data: ")]
    done = [e["logprobs"] for e in events if e["type"] == "response.output_text.done"]
    assert ["".join(each["token"] for each in text)[-1] for text in done] == ["a", "b"]
    assert sum(map(len, done)) < len(every) / 2


@pytest.mark.parametrize("usage_at_end", [True, False])
@given(text=st.text(), name=st.text(), index=st.integers(0, 127))
def test_a_chunk_of_plain_text_is_written_as_any_other(
    alone: Model, usage_at_end: bool, text: str, name: str, index: int
) -> None:
    nobody: Any = None
    shapes = (
        ChatShape(alone.tokenizer, logprobs=False),
        CompletionShape(alone.tokenizer, logprobs=False, echo=[]),
    )
    for shape in shapes:
        chunks = CompletionChunks({"model": name}, shape, nobody, usage_at_end=usage_at_end)
        list(chunks.piece(Piece(index, [Text("first")], [[]])))
        piece = Piece(index, [Text(text)], [[]])
        assert shape.plain(piece) == text
        assert [*chunks.piece(piece)] == [*chunks.parts(piece)]
