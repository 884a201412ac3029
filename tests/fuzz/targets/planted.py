"""Does what no input may do, for the test of the harness itself; FUZZ_PLANTED says what."""

import os
import random
import signal
import time
from itertools import count

GROWTH_LIMIT = 16 << 20
more = count()  # a peak grows only where it is passed


def one(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "good"
    match os.environ["FUZZ_PLANTED"]:
        case "exception":
            raise ValueError("planted")
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(60)
        case "memory":
            bytearray(b"x") * (64 << 20 << next(more))
    return "done"
