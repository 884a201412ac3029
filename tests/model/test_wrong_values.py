"""Every argument of every public function, given what it is not: a UsageError that names it.

The functions are found by walking what is public, and the arguments by their signatures, so that a
new one fails here until it is said what would be wrong for it.
"""

import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest

import isobit
from isobit import Model
from isobit.config import EngineConfig
from isobit.errors import UsageError, shown
from isobit.runtime.sequence import Sequence
from isobit.verify.receipt import Receipt, replay
from isobit.verify.trace import record
from isobit.verify.trace_file import Trace
from tests.helpers.synth import write_model

HUGE = 10**5000
NO_NUMBER = ["", "1", b"1", [1], {}, True, np.True_, math.nan, object()]
NO_WHOLE = [*NO_NUMBER, 1.5, math.inf, -1, HUGE]
NO_TEXT = [3, True, b"x", ["x"], object(), "\ud800"]
NO_LIST = [5, True, "x", b"x", {"x": 1}, object()]
NO_ID_LISTS = [5, True, b"ab", {1: 2}, {1, 2}, [True], [1.0], [None], [-1], [HUGE], object()]
NO_IDS = [*NO_ID_LISTS, ["1"]]
NO_MAPPINGS = [*NO_LIST, [3], ["x"], [None], [object()]]
NO_PROMPT = [*NO_ID_LISTS, None, [], "", "\ud800", [[]], [[1], ["x"]], ["", "x"], ["x", 3]]
NO_PATH = [None, 3, True, b"x", ["x"], object()]

WRONG: dict[str, list[Any]] = {
    "bool": [None, 0, 1, "", "x", 1.0, math.nan, []],
    "int": [None, *NO_WHOLE],
    "int | None": NO_WHOLE,
    "float": [None, *NO_NUMBER, HUGE, -HUGE, math.inf],
    "str": [None, *NO_TEXT],
    "str | None": NO_TEXT,
    "str | Path": NO_PATH,
    "str | pathlib.Path": NO_PATH,
    "bytes": [None, 3, "x", [1], True],
    "str | Sequence[str] | None": [3, True, b"x", "", [""], ["x", ""], [3], [None], {}, {"x": 1}],
    "Sequence[str]": [*NO_LIST, None, [3], [""], [None]],
    "tuple[str, ...]": [*NO_LIST, None, [3], [""], [None]],
    "str | Sequence[int]": NO_PROMPT,
    "str | Sequence[int] | list[str] | list[list[int]]": NO_PROMPT,
    "str | Sequence[int] | list[str] | list[list[int]] | None": [*NO_IDS, "\ud800", [[1]]],
    "Iterable[int]": [*NO_IDS, None, "ab"],
    "Sequence[int]": [*NO_IDS, None, "ab"],
    "collections.abc.Sequence[int]": [*NO_IDS, None, "ab", []],
    "tuple[int, ...]": [*NO_LIST, None, [0], [-1], ["1"], [True], [HUGE], [1.5]],
    "Sequence[Sequence[int]] | I32": [
        *(*NO_LIST, None, [3], [[1], [2, 3]], [[1.0], [2.0]], [[True], [True]], [["x"], ["y"]]),
        *([[-1], [1]], [[HUGE], [1]]),
    ],
    "Sequence[int] | slice | None": [
        *(3, True, "x", b"x", ["1"], [1.5], [None], [True], [99], [-99], [HUGE]),
        *(slice("x"), slice(0, 1, 0)),
    ],
    "F32": [None, 3, "x", [], np.zeros((1, 3), np.float32), np.zeros((1, 384))],
    "Mapping[int, float] | None": [
        *(5, "x", [], [(1, 1.0)], {"x": 1}, {True: 1.0}, {1.0: 1.0}, {-1: 1.0}, {HUGE: 1.0}),
        *({0: math.nan}, {0: "1"}, {0: True}, {0: None}, {0: HUGE}),
    ],
    "tuple[tuple[int, float], ...]": [5, "x", None, (1,), ((1, 2, 3),), (("1", 1.0),), ((0, "x"),)],
    "Mapping[str, object] | None": [5, True, "x", [("a", 1)], {3: 1}, {"tools": []}, {"x": {1}}],
    "Sequence[Mapping[str, object]]": [*NO_MAPPINGS, None, [], [{}], [{"role": 3}]],
    "Sequence[Mapping[str, object]] | None": [*NO_MAPPINGS, [{"x": object()}]],
    "frozenset[str] | None": [3, "x", b"x", [3], {"nosuch"}, {3}, object()],
    "range | None": [3, "x", [0], True, object()],
    "collections.abc.Callable[[isobit.verify.trace_file.Trace], None]": [3, True, "x", object()],
    "Callable[[int, int], None] | None": [3, True, "x", [], object()],
    "Callable[[str], None] | None": [3, True, "x", [], object()],
    "Tap | None": [3, True, "x", [], object()],
    "Watcher | None": [3, "x", True, [], object(), isobit.Recorder],
    "isobit.runtime.grammar.Grammar | None": [3, "x", True],
    "EngineConfig": [None, 3, {}],
    "TokenSequence": [None, 3, "x", [1]],
    "Sequence[TokenSequence]": [*NO_LIST, None, [3], [None]],
    "isobit.runtime.model.Model": [None, 3, "sample"],
    "isobit.verify.trace.Recordable | isobit.runtime.model.Model": [None, 3, "sample"],
    "isobit.verify.receipt_file.Receipt": [None, 3, {}],
    "Wanted": [None, 3, "x"],
}
"""What is wrong for an annotation."""

FINE: dict[str, list[Any]] = {
    "max_tokens": [HUGE],  # it goes on to the end of the context
    "seed": [-1],
    "index": [-1],  # the last token
    "n": [HUGE],  # as many as there are
}
"""What is right for some arguments all the same."""

ALSO_CALLED = {
    "path_or_sample": "model",
    "path": "model",
    "ids": "(token ids?|prompt)",
    "prompt": "(token ids?|text)",
    "text": "(token ids?|prompt)",
    "tokens": "token ids",
    "sequences": "sequence",
    "continuation": "(token id|text)",
    "chat_template_kwargs": "x",
}
"""How else a message may name an argument."""

NOT_HERE = {
    "Watcher": "a protocol",
    "Completion": "made by the library",
    "Timings": "made by the library",
    "ModelConfig": "made by the library",
    "Settings": "the keywords of Model.stream",
    "errors": "exceptions",
    "__version__": "a text",
    "Stream": "made by Model.stream",
    "Model.run_batch": "batches are the engine's",
    "Stream.begin": "the engine's",
    "Stream.completed": "a coroutine without arguments",
    "Recorder.begin": "called by the engine, as the next three",
    "Recorder.tap": "",
    "Recorder.routed": "",
    "Recorder.chose": "",
    "Sequence.extend": "the engine's",
    "Sequence.undo": "the engine's",
    "Sampling.check_ids": "the engine's",
    "Receipt.of": "of any JSON: FileRefused",
}
"""What is public and not tried, and why."""


class World:
    """A small model and objects of it, and right arguments for every function."""

    def __init__(self, folder: Path) -> None:
        self.model = isobit.Model(write_model(folder / "m.gguf"), "cpu", EngineConfig(threads=1))
        self.recorder = isobit.Recorder()
        self.model.generate([1, 2], max_tokens=2, watch=self.recorder)
        self.receipt = self.recorder.receipt()
        self.receipt.save(folder / "r.json")
        self.folder = folder
        self.trace = record(self.model, [1, 2])
        self.trace.save(folder / "t.trace")

    def owner(self, name: str) -> Any:
        """What a method is called on."""
        kept = {"Model": self.model, "Recorder": self.recorder, "Receipt": self.receipt}
        return (kept | {"Trace": self.trace, "Sequence": self.model.new_sequence()}).get(name)

    def right(self, function: str) -> dict[str, Any]:
        """Right arguments for those that must be given."""
        said = [{"role": "user", "content": "x"}]
        logits = self.model.logits([1, 2])
        sequence = self.model.new_sequence()
        return {
            "load": {"path_or_sample": self.model.path, "backend": "cpu"},
            "Model": {"path": self.model.path, "backend": "cpu", "engine": EngineConfig(threads=1)},
            "Model.tokenize": {"text": "x"},
            "Model.detokenize": {"ids": [1]},
            "Model.logits": {"prompt": [1, 2]},
            "Model.logprobs": {"logits": logits, "ids": [[1], [2]]},
            "Model.score": {"text": [1, 2]},
            "Model.stream": {"prompt": [1, 2]},
            "Model.generate": {"prompt": [1, 2], "max_tokens": 1},
            "Model.chat": {"messages": said, "max_tokens": 1},
            "Model.chat_ids": {"messages": said},
            "Model.chat_prompt": {"messages": said},
            "Model.checked": {"ids": [1]},
            "Model.forward": {"sequence": sequence, "ids": [1]},
            "Model.prefill": {"sequence": sequence, "ids": [1]},
            "Model.step": {"sequences": [sequence], "tokens": [1]},
            "Recorder.experts_of": {"index": 0},
            "Recorder.save_routes": {"path": self.folder / "routes"},
            "Receipt.load": {"path": self.folder / "r.json"},
            "Receipt.load_all": {"path": self.folder / "r.json"},
            "Receipt.save": {"path": self.folder / "r2.json"},
            "Trace.load": {"path": self.folder / "t.trace"},
            "Trace.save": {"path": self.folder / "t2.trace"},
            "Trace.margin": {"layer": 0},
            "record": {"source": self.model, "tokens": [1, 2]},
            "replay": {"receipt": self.receipt, "model": self.model},
        }.get(function, {})


def functions() -> dict[str, Any]:
    """Everything that is public and called, by name."""
    public = {name: getattr(isobit, name) for name in isobit.__all__}
    public |= {"record": record, "replay": replay}
    for kept in (Receipt, Trace, Sequence):
        public[kept.__name__] = kept
        NOT_HERE.setdefault(kept.__name__, "made by the library")
    found = {}
    for name, thing in public.items():
        found[name] = thing
        if isinstance(thing, type) and NOT_HERE.get(name) != "a protocol":
            found |= {
                f"{name}.{method}": getattr(thing, method)
                for kind in thing.__mro__
                if kind.__module__.startswith("isobit")
                for method, value in vars(kind).items()
                if not method.startswith("_")
                and isinstance(value, (FunctionType, classmethod, staticmethod))
            }
    return {name: thing for name, thing in found.items() if name not in NOT_HERE}


def arguments(thing: Any) -> Iterator[tuple[str, str]]:
    """The names and annotations of a function's arguments, keywords of a TypedDict unpacked."""
    for name, parameter in inspect.signature(thing).parameters.items():
        annotation = parameter.annotation
        if parameter.kind == inspect.Parameter.VAR_KEYWORD:
            like = {"Settings": Model.stream, "ChatVariables": Model.chat_prompt}
            other = like[str(annotation)[len("Unpack[") : -1]]
            keywords = inspect.signature(other).parameters.values()
            yield from ((p.name, str(p.annotation)) for p in keywords if p.kind == p.KEYWORD_ONLY)
        elif name != "self":
            text = annotation if isinstance(annotation, str) else None
            yield name, text or inspect.formatannotation(annotation)


FUNCTIONS = functions()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("world"))
    with world.model:
        yield world


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_argument(function: str, world: World) -> None:
    thing = FUNCTIONS[function]
    faults = []
    for name, annotation in arguments(thing):
        assert annotation in WRONG, f"say in WRONG what is wrong for {name}: {annotation}"
        for wrong in WRONG[annotation]:
            if any(wrong is fine for fine in FINE.get(name, ())):
                continue
            owner = world.owner(function.partition(".")[0])
            call = getattr(owner, thing.__name__) if "." in function else thing
            try:
                call(**world.right(function) | {name: wrong})
            except UsageError as error:
                line = str(error)
                what = rf"\b({name}|{ALSO_CALLED.get(name, name)})\b"
                if not re.search(what, line) or len(line) > 250 or "\n" in line:
                    faults.append(f"{name}={shown(wrong)}: says {line[:200]!r}")
            except BaseException as error:
                faults.append(f"{name}={shown(wrong)}: {type(error).__name__}: {str(error)[:100]}")
            else:
                faults.append(f"{name}={shown(wrong)}: passes")
    assert not faults, "\n".join([function, *faults])
