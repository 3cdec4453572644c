"""A driver that is killed takes everything with it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from asyncdapo.controller.process.reaper import descendants, is_alive, start_time

DRIVER = """
import subprocess, sys, time
from asyncdapo.controller.process.reaper import reaper
STUBBORN = '''
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
print("up", flush=True)
time.sleep(600)
'''
with reaper():
    child = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    child.stdout.readline(), child.stdout.readline()
    time.sleep(1.5)
    print("watched", flush=True)
    if "--end" not in sys.argv:
        time.sleep(600)
"""


def gone_within(processes, seconds):
    deadline = time.monotonic() + seconds
    while any(map(is_alive, processes)):
        assert time.monotonic() < deadline, f"still there: {[p for p in processes if is_alive(p)]}"
        time.sleep(0.1)


def started_driver(*args):
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *args], stdout=subprocess.PIPE, text=True)
    assert driver.stdout.readline() == "watched\n"
    return driver


def test_a_killed_driver_takes_processes_along_that_heed_nothing_and_left_its_session_even_after_ctrl_c():
    driver = started_driver()
    below = descendants(driver.pid)
    assert len(below) == 3, "the reaper, a child, and a grandchild in a session of its own"
    (reaper,) = [pid for pid, _ in below if "reaper" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(reaper, signal.SIGINT)  # as a terminal does
    driver.kill()
    driver.wait()
    gone_within(below, 10)


def test_a_driver_that_ends_well_leaves_nothing_either():
    driver = started_driver("--end")
    below = descendants(driver.pid)
    assert driver.wait(20) == 0
    gone_within(below, 1)


def test_a_process_is_known_by_its_start_and_not_by_its_number_alone():
    own = (os.getpid(), start_time(os.getpid()))
    assert is_alive(own)
    assert not is_alive((os.getpid(), own[1] + "1"))
    assert start_time(2**22 + 1) == ""
