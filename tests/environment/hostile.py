"""Environments that do what they are told: by the row at `reset`, by the response at `step`, or by a script."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path


def obey(order):
    """Carries out an order, and returns what the method then returns. Unknown orders are echoed."""
    word, _, rest = order.partition(" ")
    match word:
        case "hang":
            time.sleep(600)
        case "hang_once":
            if not Path(rest).exists():
                Path(rest).touch()
                time.sleep(600)
        case "spin":
            while True:
                pass
        case "raise":
            raise ValueError(rest)
        case "raise_once":
            if not Path(rest).exists():
                Path(rest).touch()
                raise ConnectionError("busy")
        case "stop_iteration":
            raise StopIteration
        case "leave":
            sys.exit(3)
        case "interrupt":
            raise KeyboardInterrupt
        case "exit":
            os._exit(int(rest))
        case "segfault":
            os.abort()
        case "exit_once":
            if not Path(rest).exists():
                Path(rest).touch()
                os._exit(1)
        case "sleep":
            time.sleep(float(rest))
        case "long":
            return "x" * int(rest)
        case "print":
            print("\0\ud800".encode(errors="replace"), rest * 10_000, flush=True)
            print(rest, file=sys.stderr)
        case "read":
            return f"read {sys.stdin.read()!r}"
        case "fork":
            if not os.fork():
                time.sleep(600)
        case "bomb":
            for _ in range(int(rest)):
                os.fork()  # 2 ** rest processes, this one among them
            time.sleep(600)
        case "sessions":
            for _ in range(4):
                subprocess.Popen(["sleep", "600"], start_new_session=True)
            os._exit(1)
        case "threads":
            for _ in range(20):
                threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        case "close":
            os.closerange(3, 100)
        case "write":
            for number in range(3, 20):
                with suppress(OSError):
                    os.write(number, b"{}\n")
        case "surrogate":
            return "\ud800"
        case "end":
            return None, float(rest or 0)
        case "reward":
            return "more", float(rest)
        case "return":
            return eval(rest)
    return f"heard {order}"


class Plain:
    num_steps = 0

    def reset(self, row):
        return obey(row["reset"]) if row.get("reset") else None

    def step(self, response):
        self.num_steps += 1
        return obey(response)

    def metrics(self):
        return {"num_steps": self.num_steps}


class Script:
    """The row's text has an order for each call: `reset`, every `step`, `metrics`. Responses don't matter."""

    def reset(self, row):
        script = json.loads(row["prompt"])
        self.orders, self.measured = iter(script["step"]), script["metrics"]
        return obey(script["reset"]) if script["reset"] else None

    def step(self, response):
        order = next(self.orders, "end 1")
        if order == "forever":
            self.orders = iter([order] * 2)
        return obey(order)

    def metrics(self):
        return obey(self.measured) if self.measured else {}


class Async:
    async def reset(self, row):
        return None

    async def step(self, response):
        if response.startswith("await "):
            await asyncio.sleep(float(response.removeprefix("await ")))
            return "slept"
        return obey(response)


class BadMetrics(Plain):
    def metrics(self):
        return {"nan": float("nan")}


class Failing:
    def __init__(self):
        raise RuntimeError("no licence")
