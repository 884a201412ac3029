"""``isobit chat`` with a model that thinks and calls: what is printed, what the next turn says."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from isobit.cli import chat as command
from isobit.cli.stream_printer import StreamPrinter, read_json
from isobit.errors import UsageError
from isobit.runtime.generation import Completion, Timings
from isobit.server.parsing.thinking import Thinking
from isobit.server.request.chat import Chat
from isobit.server.tool_calls.tagged import Hermes
from isobit.server.tool_calls.tools import Tool

TOOL = {"type": "function", "function": {"name": "f"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'


def completion(text: str) -> Completion:
    return Completion(text, [1], "stop", Timings(1, 1.0, 1, 1.0), 0)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str], list[str]], list[Any]]:
    """A conversation in which the model says these texts, and a person types these lines."""

    def run(said: list[str], typed: list[str]) -> list[Any]:
        prompts: list[Any] = []

        def begun(model: Any, asked: Any) -> Chat:
            prompts.append(json.loads(json.dumps(asked.messages)))
            thinking = Thinking("<think>", "</think>", begun=None)
            return Chat(model, [1], None, thinking, Hermes([Tool("f")]))

        def follow(_model: Any, _ids: Any, _settings: Any, write: Any) -> Completion:
            text = said.pop(0)
            for character in text:
                write(character, [1])
            return completion(text)

        def read(_prompt: str) -> str:
            if not typed:
                raise EOFError
            return typed.pop(0)

        monkeypatch.setattr(command, "begun", begun)
        monkeypatch.setattr(command, "follow", follow)
        monkeypatch.setattr("builtins.input", read)
        conversation = command.Conversation(None, {}, None, {"tools": [TOOL]})  # type: ignore
        conversation._turn(typed.pop(0))
        if typed:
            conversation._turn(typed.pop(0))
        return prompts

    return run


def test_calls_ask_for_what_they_give(
    talk: Callable[[list[str], list[str]], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    said = [f"<think>\nHm.\n</think>\n\nI ask.\n{CALL}\n{CALL}", "Done.", "Yes."]
    prompts = talk(said, ["Do it", "one", "two", "And?"])
    out, err = capsys.readouterr()
    assert out == 'I ask.\n→ f {"n": 1}\n→ f {"n": 1}\nDone.Yes.'
    assert err.startswith("Hm.\n\n")
    user, answer, *given = prompts[1]
    assert user == {"role": "user", "content": "Do it"}
    assert (answer["content"], answer["reasoning_content"]) == ("I ask.", "Hm.")
    assert [c["function"]["arguments"] for c in answer["tool_calls"]] == ['{"n": 1}'] * 2
    assert [(m["role"], m["content"]) for m in given] == [("tool", "one"), ("tool", "two")]
    assert [m["tool_call_id"] for m in given] == [c["id"] for c in answer["tool_calls"]]
    assert prompts[2][-2:] == [
        {"role": "assistant", "content": "Done."},
        {"role": "user", "content": "And?"},
    ]


def test_a_call_without_a_result_takes_the_message_back(
    talk: Callable[[list[str], list[str]], list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    talk([CALL], ["Do it"])
    assert "taken back" in capsys.readouterr().err


def test_ctrl_d_ends_a_message_of_several_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    def typed(*lines: str) -> str:
        given = list(lines)

        def read(_prompt: str) -> str:
            if not given:
                raise EOFError
            return given.pop(0)

        monkeypatch.setattr("builtins.input", read)
        return command._read()

    assert typed('"""one', "two") == "one\ntwo"
    assert typed('"""', "one", 'two"""') == "one\ntwo"
    with pytest.raises(EOFError):
        typed()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("/help", True), ("/system Be kind", True), ("/sytem Be kind", True), ("/nosuch", True)),
        *(("/usr/bin is full", False), ("/usr/bin", False), ("/etc is full", False)),
        *(("/ what", False), ("/help\nme", False), ("help", False), ("/tmp is full", False)),
    ],
)
def test_a_path_is_no_command(text: str, expected: bool) -> None:
    assert command._is_command(text) is expected


def test_plain_answers_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    printer = StreamPrinter(Chat(None))  # type: ignore[arg-type]
    for character in " <think> \x1b[2J\n":
        printer.write(character, [])
    assert printer.end(cut=False).text == " <think> \x1b[2J\n"
    assert capsys.readouterr().out == " <think> \x1b[2J\n"


@pytest.mark.parametrize("text", ["{", "1", "[" * 100_000])
def test_options_in_json_are_checked(text: str) -> None:
    with pytest.raises(UsageError, match="--tools: expected a list in JSON"):
        read_json(text, "--tools", list)
