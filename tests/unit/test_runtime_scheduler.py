"""The scheduler as a state machine: whatever arrives and leaves, pages add up and all get done.

Beside it stand a device, which knows of every slot the text that was written there, and a model,
whose next token is a function of the whole text before it.
"""

import zlib
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from isobit.errors import UsageError
from isobit.numerics import KV_PAGE
from isobit.runtime.blocks import Blocks
from isobit.runtime.request import Request, State
from isobit.runtime.scheduler import KEEP_EVERY, Limits, QueueFull, Scheduler, Work


def after(tokens: list[int]) -> int:
    """What follows a text; few tokens, so that texts meet."""
    return zlib.crc32(bytes(tokens)) % 3


class World:
    """A scheduler, the device it schedules for, and the requests there are."""

    def __init__(self, pages: int, limits: Limits, states: int = 0) -> None:
        self.scheduler = Scheduler(Blocks(pages, states), limits)
        self.device: dict[tuple[int, int], list[int]] = {}
        self.states: dict[int, list[int]] = {}
        """Of each recurrent state the text that led to it."""
        self.arrived: list[Request] = []
        self.admitted: list[Request] = []
        self.following: list[Work] = []
        """What was said to come next, if that was asked for; the device has begun with it."""
        self.slots: list[list[tuple[int, int]]] = []
        """Where each part of it writes."""

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.arrived.append(request)

    def cancel(self, request: Request) -> None:
        self.scheduler.finish(request)
        self.arrived = [r for r in self.arrived if r is not request]

    def step(self, guesses: int = 0, *, ahead: bool = False) -> list[Work]:
        """One pass; ``ahead``: and what comes after it, before it has run."""
        limits, scheduler = self.scheduler.limits, self.scheduler
        before = list(scheduler.running)
        for request in before:
            if request.behind == 1 and guesses:
                request.drafts = self.guess(request, guesses)
        self.copy()
        works = self.go_on()
        follows = bool(works)
        works = works or scheduler.schedule()
        self.copy()
        self.admitted += [r for r in scheduler.running if r not in before]
        total = sum(len(w.tokens) for w in works)
        assert total <= limits.pass_tokens
        assert len(works) == len({id(w.request) for w in works}) <= limits.running
        if scheduler.running and not follows:
            assert works[0].request is scheduler.running[0], "the oldest waits"
        generating = [r for r in scheduler.running if r.behind == 1]
        assert follows or all(any(w.request is r for w in works) for r in generating)
        if ahead:
            self.following = scheduler.following(works)
            assert sum(len(w.tokens) for w in self.following) <= limits.pass_tokens
            self.slots = [self.slots_of(work) for work in self.following]
        if generating:
            prompts = sum(len(w.tokens) for w in works if w.request.behind > 1)
            assert prompts <= limits.prompt_tokens
        scored = [w for w in works if w.request.wanted and w.request.behind > 1]
        rows = sum(w.start + row in w.request.wanted for w in scored for row in w.rows)
        assert rows <= limits.pass_rows
        for work in works:
            self.run(work)
        for work in works:
            self.take(work)
        return works

    def go_on(self) -> list[Work]:
        """What is left of the pass that has begun; the rest of it leaves rubbish."""
        begun, self.following = self.following, []
        works = self.scheduler.go_on(begun)
        for work, slots in zip(begun, self.slots, strict=False):
            if not any(work is other for other in works):
                self.device.update({slot: [-1] for slot in slots})
        return works

    @staticmethod
    def slots_of(work: Work) -> list[tuple[int, int]]:
        pages = work.request.table.pages
        positions = range(work.start, work.start + len(work.tokens))
        return [(pages[position // KV_PAGE], position % KV_PAGE) for position in positions]

    def copy(self) -> None:
        """What the engine does with states between passes."""
        for source, target in self.scheduler.copies:
            self.states[target] = self.states[source]
        self.scheduler.copies.clear()

    def lose(self) -> None:
        """A pass that does not end well."""
        self.go_on()
        self.copy()
        for work in self.scheduler.schedule():
            self.copy()
            self.run(work)
            self.states[work.request.table.state] = [-1]
            self.scheduler.rerun(work.request)

    def guess(self, request: Request, n: int) -> list[int]:
        """Drafts, of which the first half is right."""
        tokens = list(request.tokens)
        for _ in range(n):
            tokens.append(after(tokens))
        drafts = tokens[len(request.tokens) :]
        return drafts[: n // 2] + [2 - d for d in drafts[n // 2 :]]

    def run(self, work: Work) -> None:
        """The pass itself: reads everything before, writes its own slots."""
        request, pages = work.request, work.request.table.pages
        assert len(set(pages)) == len(pages) <= request.pages_needed
        text = request.tokens + request.drafts
        assert work.tokens == text[work.start : work.start + len(work.tokens)]
        for position in range(work.start):
            slot = (pages[position // KV_PAGE], position % KV_PAGE)
            assert self.device[slot] == text[: position + 1], "another text's keys and values"
        for i, slot in enumerate(self.slots_of(work), work.start):
            self.device[slot] = text[: i + 1]
        for position in request.wanted:
            if work.start <= position < work.start + len(work.tokens):
                assert position - work.start in work.rows
        if self.scheduler.blocks.states:
            if work.start:
                assert self.states[request.table.state] == text[: work.start]
            self.states[request.table.state] = text[: work.start + len(work.tokens)]

    def take(self, work: Work) -> None:
        """What the logits say, and what comes of it."""
        request = work.request
        done = work.start + len(work.tokens) - work.drafts
        new: list[int] = []
        if done == len(request.tokens) and request.max_tokens:
            n = len(work.tokens)
            assert list(work.rows)[-1 - work.drafts :] == list(range(n - 1 - work.drafts, n))
            text = list(request.tokens)
            for draft in [*work.tokens[len(work.tokens) - work.drafts :], None]:
                new.append(after(text))
                text.append(new[-1])
                if draft != new[-1]:
                    break
        self.scheduler.computed(work, new)
        assert request.generated <= request.max_tokens
        if not request.behind or 0 < request.max_tokens == request.generated:
            self.scheduler.finish(request)
            assert request.table.pages == []
            self.check_text(request)
            self.arrived = [r for r in self.arrived if r is not request]

    @staticmethod
    def check_text(request: Request) -> None:
        text = list(request.prompt)
        while len(text) < len(request.prompt) + request.max_tokens:
            text.append(after(text))
        assert request.tokens == text

    def check(self) -> None:
        scheduler, blocks = self.scheduler, self.scheduler.blocks
        blocks.check([r.table for r in scheduler.running])
        assert blocks.free + blocks.cached + blocks.held == blocks.total
        assert 0 <= scheduler.promised <= blocks.available
        assert (
            len(scheduler.running) + blocks.available_states == blocks.states or not blocks.states
        )
        assert [*scheduler.running, *scheduler.waiting] == self.arrived
        assert all(r.state is State.RUNNING for r in scheduler.running)
        assert all(r.state is State.WAITING for r in scheduler.waiting)

    def finish_all(self) -> None:
        """Nobody starves: each pass does at least one token of the oldest."""
        left = sum(len(r.prompt) + r.max_tokens for r in self.arrived)
        while self.arrived:
            assert left >= 0
            left -= 1
            self.step()
        assert self.scheduler.schedule() == []
        assert self.scheduler.blocks.held == 0


class Arrivals(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        pages=st.integers(1, 12),
        running=st.integers(1, 6),
        more=st.integers(0, 150),
        prompt_tokens=st.integers(1, 100),
        rows=st.integers(1, 70),
        waiting=st.integers(1, 6),
        states=st.sampled_from([0, 0, 1, 2, 4, 9]),
    )
    def begin(
        self,
        pages: int,
        running: int,
        more: int,
        prompt_tokens: int,
        rows: int,
        waiting: int,
        states: int,
    ) -> None:
        limits = Limits(running + more, prompt_tokens, rows, running, waiting)
        self.world = World(pages, limits, states)

    @rule(
        target=requests,
        shared=st.one_of(
            st.integers(0, 4 * KV_PAGE), st.sampled_from([KV_PAGE, 2 * KV_PAGE, 3 * KV_PAGE])
        ),
        own=st.lists(st.integers(0, 2), max_size=9),
        most=st.integers(0, 90),
        salt=st.sampled_from(["", "", "", "x", None]),
        wanted=st.sets(st.integers(0, 4 * KV_PAGE), max_size=90),
        score=st.sampled_from([None, None, None, 0, 7, 2]),
    )
    def arrive(
        self,
        shared: int,
        own: list[int],
        most: int,
        salt: str | None,
        wanted: set[int],
        score: int | None,
    ) -> Request:
        text = [0]
        while len(text) < 4 * KV_PAGE:
            text.append(after(text))
        prompt = (text[:shared] + own) or [1]
        rows: Sequence[int] = ()
        if score is not None:
            n = len(prompt)
            rows = range(n // score, n) if score else sorted(p for p in wanted if p < n)
        request = Request(prompt, most, salt, rows)
        try:
            self.world.add(request)
        except UsageError:
            assert request.pages_needed > self.world.scheduler.blocks.total
        except QueueFull:
            assert len(self.world.arrived) == self.world.scheduler.limits.requests
        return request

    @rule(request=consumes(requests))
    def leave(self, request: Request) -> None:
        if request in self.world.arrived:
            self.world.cancel(request)

    @rule(guesses=st.sampled_from([0, 0, 1, 4]), n=st.integers(1, 12), ahead=st.booleans())
    def steps(self, guesses: int, n: int, ahead: bool) -> None:
        for _ in range(n):
            if self.world.scheduler.blocks.states or self.world.following:
                guesses = 0
            can = not self.world.scheduler.blocks.states and not guesses
            self.world.step(guesses, ahead=ahead and can)
            self.world.check()

    @rule()
    def fail(self) -> None:
        if self.world.scheduler.running:
            self.world.lose()

    @precondition(lambda self: self.world.scheduler.blocks.cached)
    @rule()
    def forget(self) -> None:
        self.world.scheduler.blocks.forget()

    @invariant()
    def in_order(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.finish_all()


Arrivals.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestArrivals = Arrivals.TestCase


def world(pages: int = 100, states: int = 0, **limits: int) -> World:
    return World(pages, Limits(**limits), states)


def test_a_prompt_goes_on_from_the_last_kept_state() -> None:
    w = world(states=6, pass_tokens=1000)
    first = [n % 7 for n in range(3 * KEEP_EVERY // 2)]
    w.add(Request(first, 5))
    w.finish_all()
    last = 5 * KV_PAGE  # the first prompt's last full page, but for its last token
    for prompt, cached in (
        ([*first, 5, 5], last),
        ([*first[:last], 5, 5], last),
        ([*first[: last - 1], 5, 5], KEEP_EVERY),
        ([*first[: KEEP_EVERY - 1], 5, 5], 0),
        (first, last),
    ):
        request = Request(prompt, 2)
        w.add(request)
        w.finish_all()
        assert request.cached == cached
    longer = Request([*first, *first], 1)
    w.add(longer)
    w.finish_all()
    again = Request([*first, *first, 1], 1)
    w.add(again)
    w.finish_all()
    assert again.cached == len(longer.prompt) // KV_PAGE * KV_PAGE


def test_kept_states_are_few_and_the_longest_unused_goes() -> None:
    w = world(states=3)
    prompts = [[n] * (KV_PAGE + 1) for n in range(4)]
    for prompt in prompts:
        w.add(Request(prompt, 1))
        w.finish_all()
    assert w.scheduler.blocks.kept == 2  # one was the running sequence's
    for prompt, cached in ((prompts[3], KV_PAGE), (prompts[0], 0)):
        request = Request(prompt, 1)
        w.add(request)
        w.finish_all()
        assert request.cached == cached


def test_a_prompt_leaves_its_neighbours_their_tokens() -> None:
    w = world(pass_tokens=64, prompt_tokens=16, running=4)
    for n in (3, 5):
        w.add(Request([1] * n, 50))
    w.step()
    w.add(Request([2] * 500, 5))
    for _ in range(8):
        assert [len(work.tokens) for work in w.step()] == [1, 1, 16]


def test_alone_a_prompt_takes_the_whole_pass() -> None:
    w = world(pass_tokens=64, prompt_tokens=16, running=4)
    w.add(Request([2] * 150, 5))
    assert [len(w.step()[0].tokens) for _ in range(4)] == [64, 64, 22, 1]


def test_a_large_request_is_not_passed_by() -> None:
    w = world(pages=4, running=8)
    w.add(Request([0] * 100, 60))
    w.step()
    large, small = Request([1] * 200, 1), Request([2], 1)
    w.add(large)
    w.add(small)
    w.finish_all()
    assert w.admitted.index(large) < w.admitted.index(small)


def test_admission_keeps_what_running_requests_may_need() -> None:
    w = world(pages=4)
    w.add(Request([0] * 10, 3 * KV_PAGE))  # at its longest in four pages, now in one
    w.step()
    w.add(Request([1], 1))
    assert w.scheduler.blocks.available == 3
    assert len(w.step()) == 1
    w.finish_all()


def test_a_cached_prompt_is_run_only_in_its_last_tokens() -> None:
    w = world()
    prompt = [n % 7 for n in range(200)]
    for expected in (200, 200 - 3 * KV_PAGE, 200 - 3 * KV_PAGE):
        request = Request(prompt, 1)
        w.add(request)
        assert len(w.step()[0].tokens) == expected
        assert request.cached == 200 - expected
    exact = Request(
        prompt[: 2 * KV_PAGE], 1
    )  # of all that is known, the last page runs for its row
    w.add(exact)
    assert len(w.step()[0].tokens) == KV_PAGE
    w.add(Request(prompt, 0, wanted=[KV_PAGE + 1, 150]))
    work = w.step()[0]
    assert (work.start, work.rows) == (KV_PAGE, [1, 150 - KV_PAGE])


def test_logits_of_a_prompt_come_in_parts() -> None:
    w = world(pass_rows=10, pass_tokens=50, running=4)
    w.add(Request([3] * 60, 0, wanted=range(20, 60)))
    parts = []
    while w.arrived:
        [work] = w.step()
        parts.append((work.start, len(work.tokens), work.rows))
    ten = list(range(10))
    assert parts == [(0, 30, list(range(20, 30))), (30, 10, ten), (40, 10, ten), (50, 10, ten)]


def test_what_cannot_fit_is_refused_and_a_full_queue_says_so() -> None:
    w = world(pages=2, running=1, waiting=1)
    with pytest.raises(UsageError, match="at most 128 positions"):
        w.add(Request([1] * 100, 40))
    w.add(Request([1] * 100, 29))  # 100 + 28 are run
    w.add(Request([1], 1))
    with pytest.raises(QueueFull, match="2 requests wait"):
        w.add(Request([1], 1))
    w.finish_all()


def test_limits_that_would_starve_are_refused() -> None:
    for limits in ({"running": 9, "pass_tokens": 8}, {"prompt_tokens": 0}, {"running": 0}):
        with pytest.raises(UsageError):
            Limits(**limits)


def test_limits_that_become_less_let_what_runs_go_on() -> None:
    w = world(pass_tokens=8, running=4)
    for request in (*(Request([n], 9) for n in range(1, 4)), Request([5] * 40, 2)):
        w.add(request)
        w.step()
    w.scheduler.limits = Limits(pass_tokens=1, running=1)
    works = w.scheduler.schedule()
    assert [len(work.tokens) for work in works] == [1, 1, 1]  # and of the prompt none
