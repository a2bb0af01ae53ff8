"""Commands in the background, and what several of these files need."""
import contextlib
import multiprocessing
import os
import resource
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest

from test_all import HERE, PYTHON, SMALL, TORCHRUN, assert_same_bits, last_checkpoint

TRAIN = HERE / "tests" / "little.py"
LAUNCHERS = {"one process": PYTHON, "two ranks": [*TORCHRUN, "--nproc_per_node=2"]}
RUN = [*SMALL, "--batch", "4", "--steps", "60", "--save-every", "2", "--dropout", "0.1", "--out"]


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """launcher -> the folder of a run by RUN that nothing disturbed."""
    folder, made = tmp_path_factory.mktemp("unbroken"), {}

    def run(launcher):
        if launcher not in made:
            made[launcher] = folder / launcher.split()[0]
            run_ranks({"one process": 0, "two ranks": 2}[launcher], TRAIN, *RUN, made[launcher])
        return made[launcher]
    return run


def start_script(*command):
    """A command in the background, in a process group of its own; its output goes to `.said`."""
    file = tempfile.NamedTemporaryFile()        # read by name: a seek of this handle would move where the command writes
    process = subprocess.Popen([str(word) for word in command], cwd=HERE, stdout=file, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    process.said = lambda: Path(file.name).read_text("utf-8", "replace")
    return process


SERVER = multiprocessing.get_context("forkserver")      # starts processes that have torch imported: torchrun takes seconds
SERVER.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp"])


def be_rank(environment, said, script, flags):
    sys.stdout = sys.stderr = open(said, "a", buffering=1)
    os.environ |= environment
    sys.argv, code = [script, *flags], 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def run_ranks(world, script, *flags, code=0):
    """A Python script as `world` ranks, as torchrun would start them, or (0) as one process without -> their output."""
    with socket.socket() as free, tempfile.NamedTemporaryFile() as file:
        free.bind(("127.0.0.1", 0))
        common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        free.close()
        ranks = [SERVER.Process(target=be_rank, args=(common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if world else {}, file.name, str(script),
                                                      [str(flag) for flag in flags])) for rank in range(max(1, world))]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(600)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        said = Path(file.name).read_text("utf-8", "replace")
    assert None not in codes and min(codes) >= 0 and max(codes) == code, said      # below 0: died of a signal
    return said


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
