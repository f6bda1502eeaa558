"""Errors that torch's C++ code raises in a step that was resumed elsewhere than it was started."""

import subprocess
import sys

SCRIPT = """
import operator, sys
import torch
from skippipe_plugin.driver.capture.suspend import new_step_thread
from skippipe_plugin.engine.call import Ambient

def started(depth):
    def fail():
        thread.suspend(None)
        torch.ones(2, 3) @ torch.ones(2, 3)

    thread = new_step_thread()
    operator.call(*[operator.call] * depth, thread.start, fail, Ambient.current(("cpu",)))
    return thread

def resumed(thread, depth):
    try:
        operator.call(*[operator.call] * depth, thread.resume, None)
    except RuntimeError as error:
        print(str(error).split(" (")[0])

for start in range(0, 300, 50):
    for resume in range(0, 300, 50):
        resumed(started(start), resume)
"""


def test_they_are_errors_and_end_no_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["mat1 and mat2 shapes cannot be multiplied"] * 36
