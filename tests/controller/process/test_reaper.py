"""A driver that is killed takes everything with it."""

import signal
import subprocess
import sys
import time

import psutil

from asyncdapo.controller.process.reaper import descendants, is_alive

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


def test_a_killed_driver_takes_along_processes_that_ignore_signals_and_left_its_session_even_after_ctrl_c():
    driver = started_driver()
    below = descendants(driver.pid)
    assert len(below) == 3, "the reaper, a child, and a grandchild in a session of its own"
    (reaper,) = [process for process in below if any("reaper" in word for word in process.cmdline()[:3])]
    reaper.send_signal(signal.SIGINT)  # as a terminal does
    driver.kill()
    driver.wait()
    gone_within(below, 10)


def test_a_driver_that_ends_well_leaves_nothing_either():
    driver = started_driver("--end")
    below = descendants(driver.pid)
    assert driver.wait(60) == 0
    gone_within(below, 10)


def test_a_zombie_is_not_alive():
    process = subprocess.Popen([sys.executable, "-c", ""])
    known = psutil.Process(process.pid)
    assert is_alive(psutil.Process())
    gone_within([known], 10)
    assert known.status() == psutil.STATUS_ZOMBIE  # nobody has waited for it yet
    process.wait()
    assert not is_alive(known)
    assert descendants(known.pid) == set()


def test_a_reaper_that_is_up_after_its_driver_has_died_kills_nobody_else():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with subprocess.Popen(["sleep", "60"]) as bystander:
        command = [sys.executable, "-m", "asyncdapo.controller.process.reaper", str(gone.pid)]
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=20, check=True)
        assert bystander.poll() is None
        bystander.kill()
