"""Verifiers that misbehave when the text tells them to; in files of their own, as a user's are."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time


def equal(text, answer):
    return text == answer


def obey(text, answer):
    """`sleep 5`, `loop`, `raise`, `exit 3`, `segfault`, `print …`, `return nan` and the like; else equality. `wait
    FILE` makes the file, and goes on when it is gone."""
    command, _, rest = text.partition(" ")
    match command:
        case "sleep":
            time.sleep(float(rest))
        case "loop":
            while True:
                pass
        case "wait":
            open(rest, "w").close()
            while os.path.exists(rest):
                time.sleep(0.001)
        case "once":  # hangs the first time: FILE says that it was here before
            if not os.path.exists(rest):
                open(rest, "w").close()
                time.sleep(60)
        case "die_once":
            if not os.path.exists(rest):
                open(rest, "w").close()
                os._exit(7)
        case "raise":
            raise LookupError(f"nothing for {answer}")
        case "leave":
            sys.exit("no more")
        case "exit":
            os._exit(int(rest))
        case "segfault":
            ctypes.string_at(0)
        case "print":
            print(rest)
            os.write(1, b"\x07\x00\x00\x00garbage")
            print(rest, file=sys.stderr)
        case "read":
            return float(sys.stdin.read() == "")
        case "fork":  # a child that continues as if it were the process, and outlives the call
            if os.fork() == 0:
                return 0.0
        case "child":  # a process of its own, whose pid it leaves in a file
            child = subprocess.Popen(["sleep", "600"])
            with open(rest, "w") as file:
                file.write(str(child.pid))
            time.sleep(600)
        case "hog":
            bytearray(os.urandom(1 << 16)) * (1 << 12)
        case "threads":  # which would keep a process from its end
            for _ in range(8):
                threading.Thread(target=time.sleep, args=(600,)).start()
        case "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        case "recurse":
            return obey(text, answer)
        case "freeze":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "close":
            os.closerange(0, 64)
        case "return":
            return {"nan": float("nan"), "none": None, "two": 2, "half": 0.5, "list": [1]}[rest]
    return text == answer


async def obey_async(text, answer):
    """`sleep 5`, `wait FILE`, `hang`, `block`, `raise`, `raise_once FILE`; else the time of day, its own number."""
    command, _, rest = text.partition(" ")
    match command:
        case "sleep":
            await asyncio.sleep(float(rest))
        case "wait":
            open(rest, "w").close()
            while os.path.exists(rest):
                await asyncio.sleep(0.001)
        case "hang":
            await asyncio.get_running_loop().create_future()
        case "block":
            time.sleep(60)
        case "raise":
            raise ConnectionError("the judge is busy")
        case "raise_once":
            if not os.path.exists(rest):
                open(rest, "w").close()
                raise ConnectionError("the judge is busy")
    return {"acc": text == answer, "at_s": time.monotonic()}


def describe(text, answer):
    return {"acc": text == answer, "num_chars": len(text), "shouts": text.isupper()}


def busy_once(text, answer):
    """Raises until the file that the text names is there, and makes it."""
    if not os.path.exists(text):
        open(text, "w").close()
        raise ConnectionError("busy")
    return text == answer
