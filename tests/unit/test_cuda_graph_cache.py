"""Launches that come again are captured once, when that may be, and replayed."""

from collections.abc import Callable
from typing import Any

from isobit.backends.cuda.steps.graph_cache import MAX_GRAPHS, GraphCache


class Recorder:
    """What a device is asked for."""

    def __init__(self) -> None:
        self.may_wait, self.did = True, list[str]()

    def capture(self, queue: Callable[[], None]) -> Callable[[], None]:
        self.did.append("capture")
        return queue

    def replay(self, graph: Callable[[], None]) -> None:
        self.did.append("replay")
        graph()


def test_the_second_time_is_captured_and_then_replayed() -> None:
    gpu: Any = Recorder()
    repeated = GraphCache(gpu)
    for _ in range(3):
        repeated("a", lambda: gpu.did.append("a"))
    assert gpu.did == ["a", "capture", "replay", "a", "replay", "a"]


def test_nothing_is_captured_while_the_driver_must_not_wait() -> None:
    gpu: Any = Recorder()
    repeated, gpu.may_wait = GraphCache(gpu), False
    for _ in range(3):
        repeated("a", lambda: gpu.did.append("a"))
    assert gpu.did == ["a", "a", "a"]
    gpu.may_wait = True
    repeated("a", lambda: gpu.did.append("a"))
    assert gpu.did[3:] == ["capture", "replay", "a"]


def test_so_many_are_kept() -> None:
    gpu: Any = Recorder()
    repeated = GraphCache(gpu)
    for _ in range(3):
        for key in range(MAX_GRAPHS + 3):
            repeated(key, lambda: None)
    assert gpu.did.count("capture") == MAX_GRAPHS
    for key in range(10_000):
        repeated(("once", key), lambda: None)
    assert len(repeated._seen) <= 64 * MAX_GRAPHS
