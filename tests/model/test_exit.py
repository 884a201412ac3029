"""Programs that end while a pass runs: with their own exit code, whoever runs it."""

import subprocess
import sys

import pytest

_PROGRAM = """
import asyncio, sys, threading, time
import isobit

class Last:
    "Goes with the interpreter, and stays until no thread computes any more."
    def __del__(self, sleep=time.sleep, spent=time.process_time):
        before = -1
        while spent() > before + 0.01:
            before = spent()
            sleep(0.1)

last = Last()
model = isobit.load("sample", "cpu", threads=1, context=2048, chunk=2048)
prompt = [9] * 2000

def end_in_a_pass():
    while not model.generations._stepping:
        time.sleep(0.01)
    begun = time.process_time()
    while time.process_time() < begun + 0.05:
        time.sleep(0.01)
    assert model.generations._stepping
    sys.exit(7)

async def leave():
    stream = model.stream(prompt)
    reader = asyncio.ensure_future(anext(stream))
    while not model.generations._stepping:
        await asyncio.sleep(0.01)
    end_in_a_pass()
"""
_ENDS = {
    "in an event loop": "asyncio.run(leave())",
    "beside a daemon thread": (
        "threading.Thread(target=model.generate, args=(prompt,), daemon=True).start()\n"
        "end_in_a_pass()"
    ),
}


@pytest.mark.parametrize("how", _ENDS)
def test_a_program_that_ends_in_a_pass_has_its_own_exit_code(how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM + _ENDS[how]],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (7, "")
