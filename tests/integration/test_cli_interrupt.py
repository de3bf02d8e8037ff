"""Ctrl-C ends a command, whatever it was doing at that moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from support.guest import REPOSITORY

SOURCES = os.pathsep.join(str(REPOSITORY / d) for d in ("daemon", "control_domain", "proto"))
COMMAND = """
import sys, threading, time
from hsmvisor.cli import main
main.INTERRUPTED_WITHIN = 1.0
def command(**options):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        {then}
main.cli.main = command
main.main()
"""


@pytest.mark.parametrize(
    ("then", "code", "least"),
    [
        ("pass", -signal.SIGINT, 0.0),
        ("threading.Lock().acquire(timeout=60) and threading.Event().wait(60)", 130, 1.0),
        ("threading.Thread(target=time.sleep, args=(60,)).start()", 130, 1.0),  # is waited for at the end
    ],
    ids=["ends", "hangs", "a thread hangs"],
)
def test_a_command_ends(then: str, code: int, least: float) -> None:
    command = [sys.executable, "-c", COMMAND.format(then=then)]
    with subprocess.Popen(command, stdout=-1, stderr=-1, env=os.environ | {"PYTHONPATH": SOURCES}) as process:
        assert process.stdout and process.stdout.readline() == b"begun\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == code
        assert time.monotonic() - began >= least
