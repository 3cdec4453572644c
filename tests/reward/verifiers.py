"""Verifiers that misbehave when the text tells them to; in files of their own, as a user's are."""

import ctypes
import os
import subprocess
import sys
import time


def equal(text, answer):
    return text == answer


def obey(text, answer):
    """`sleep 5`, `wait FILE`, `raise`, `exit 3`, `segfault`, `print …`, `return nan`; else equality."""
    command, _, rest = text.partition(" ")
    match command:
        case "sleep":
            time.sleep(float(rest))
        case "loop":
            while True:
                pass
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
        case "fork":  # a child that goes on as if it were the process, and outlives the call
            if os.fork() == 0:
                return 0.0
        case "child":  # a process of its own, whose pid it leaves in a file
            child = subprocess.Popen(["sleep", "600"])
            with open(rest, "w") as file:
                file.write(str(child.pid))
            time.sleep(600)
        case "return":
            return {"nan": float("nan"), "none": None, "two": 2, "half": 0.5, "list": [1]}[rest]
    return text == answer
