"""Who waits in an event loop is woken by what another thread says, whenever it says it."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from isobit.runtime.wakeup import LoopWaker

LONG = 60.0


@dataclass
class Given:
    """What somebody waits for."""

    new: bool = False

    def has_news(self) -> bool:
        return self.new


def within(work: Callable[[], None]) -> asyncio.Future[None]:
    """Do it in a thread."""
    return asyncio.get_running_loop().run_in_executor(None, work)


def test_what_is_there_already_is_not_waited_for() -> None:
    async def run() -> bool:
        return await LoopWaker.of_running_loop().wait([Given(), Given(new=True)])

    assert asyncio.run(asyncio.wait_for(run(), LONG))


def test_one_tell_wakes_all_who_have_something() -> None:
    async def run() -> None:
        one, two, other = Given(), Given(), Given()
        news = LoopWaker.of_running_loop()
        waits = [asyncio.create_task(news.wait([each])) for each in (one, two, other)]
        await asyncio.sleep(0)  # all wait now

        def tell() -> None:
            one.new = two.new = True
            news.notify()

        await within(tell)
        assert await asyncio.wait_for(asyncio.gather(*waits[:2]), LONG) == [True, True]
        assert not waits[2].done()
        waits[2].cancel()

    asyncio.run(run())


def test_what_comes_between_the_look_and_the_wait_is_not_lost() -> None:
    async def run() -> bool:
        news = LoopWaker.of_running_loop()

        class Late(Given):
            """Becomes ready just after it was looked at, and another thread tells of it."""

            looks = 0

            def has_news(self) -> bool:
                self.looks += 1
                if self.looks == 1:
                    thread = threading.Thread(target=news.notify)
                    thread.start()
                    thread.join()
                    return False
                return True

        return await news.wait([Late()])

    assert asyncio.run(asyncio.wait_for(run(), LONG))


def test_waiting_ends_when_nothing_comes() -> None:
    async def run() -> bool:
        return await LoopWaker.of_running_loop().wait([Given()], 0.01)

    assert not asyncio.run(asyncio.wait_for(run(), LONG))


def test_settling_lasts_until_those_who_were_woken_ran() -> None:
    async def run() -> None:
        given, news, ran = Given(), LoopWaker.of_running_loop(), []
        seen: list[list[str]] = []

        async def reader() -> None:
            await news.wait([given])
            ran.append("reader")

        def tell() -> None:
            given.new = True
            news.notify()
            news.wait_taken(LONG)
            seen.append(list(ran))

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        await within(tell)
        assert seen == [["reader"]]
        await task

    asyncio.run(run())


def test_a_loop_that_is_closed_holds_nobody_up() -> None:
    async def here() -> LoopWaker:
        return LoopWaker.of_running_loop()

    loop = asyncio.new_event_loop()
    news = loop.run_until_complete(here())
    loop.close()
    news.notify()
    news.wait_taken(LONG)
