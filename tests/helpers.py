"""Commands in the background, and what several of these files need."""
import contextlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from test_all import HERE, PYTHON, SMALL, TORCHRUN, assert_same_bits, last_checkpoint, run_script


TRAIN = HERE / "tests" / "little.py"
LAUNCHERS = {"one process": PYTHON, "two ranks": [*TORCHRUN, "--nproc_per_node=2"]}

RUN = [*SMALL, "--batch", "4", "--steps", "100", "--save-every", "2", "--dropout", "0.1", "--out"]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """launcher -> the folder of a run by RUN that nothing disturbed."""
    folder, made = tmp_path_factory.mktemp("unbroken"), {}

    def run(launcher):
        if launcher not in made:
            made[launcher] = folder / launcher.split()[0]
            run_script(*LAUNCHERS[launcher], TRAIN, *RUN, made[launcher])
        return made[launcher]
    return run


def start_script(*command):
    """A command in the background, in a process group of its own; its output goes to `.said`."""
    file = tempfile.NamedTemporaryFile()        # read by name: a seek of this handle would move where the command writes
    process = subprocess.Popen([str(word) for word in command], cwd=HERE, stdout=file, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    process.said = lambda: Path(file.name).read_text("utf-8", "replace")
    return process


def wait_for(condition, process=None, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and (process is None or process.poll() is None), process and process.said()
        time.sleep(.01)


def processes(word):
    """Pids of the processes with `word` in their command line."""
    return [int(pid) for pid in subprocess.run(["pgrep", "-f", str(word)], capture_output=True, text=True).stdout.split()]


def assert_same_run(a, b):
    first, second = last_checkpoint(a), last_checkpoint(b)
    for part in ("step", "model", "ema", "optimizer"):
        assert_same_bits(first[part], second[part])


linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@contextlib.contextmanager
def full_disk(size=100_000):
    """No file may grow beyond `size` bytes: what a full disk does to whoever writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
