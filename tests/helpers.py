"""Shared by test_all.py and tests/: small networks and runs, commands, comparisons."""
import contextlib
import json
import math
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["DEVICE"] = "cpu"                # also on a machine with a GPU: equal bits mean on a CPU

import numpy as np                          # noqa: E402
import pytest                               # noqa: E402
import torch                                # noqa: E402
from PIL import Image                       # noqa: E402

import checkpoint                           # noqa: E402
import train                                # noqa: E402
import unet                                 # noqa: E402
import uvit                                 # noqa: E402

HERE = Path(__file__).parent.parent
torch.set_num_threads(1)                    # small tensors: a second thread only gets in the way


# ---------------------------------------------------------------------------- networks

# A network that trains in seconds, in place of `tiny`: see the fixture `little` in conftest.py.
LITTLE = dict(widths=(16, 16, 16, 32), blocks=(1, 1, 1), depth=2, head_dim=32, emb_dim=32,
              dropout=0.0, position_init="gauss")


def small_uvit(res=32, kind=uvit.UViT, **options):
    torch.manual_seed(0)
    shape = dict(widths=(16, 16, 32, 64), blocks=(1, 1, 2), depth=2, head_dim=32, emb_dim=32,
                 classes=10)
    return kind(res, **(shape | options))


def small_unet(res=32, **options):
    torch.manual_seed(0)
    return unet.UNet(res, 4, 16, 32, **(dict(classes=10, blocks_16=1, dropout=0.0) | options))


def random_weights(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=.5)
    return module.double()


def condition(label=None, portrait=None, tokens=None):
    """Plain numbers -> a Condition of tensors."""
    return uvit.Condition(*(part if part is None else torch.as_tensor(part)
                            for part in (label, portrait, tokens)))


# ---------------------------------------------------------------------------- pictures

def write_folder(folder, count=8, size=(40, 32), classes=("a", "b")):
    """Pictures of noise, in a folder per class."""
    for i in range(count):
        file = folder / classes[i % len(classes)] / f"{i}.png" if classes else folder / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)


# ---------------------------------------------------------------------------- runs

SMALL = ("--res 32 --batch 8 --accum 1 --compile off --sample-every 0 --save-every 1000 "
         "--log-every 1 --set bf16=off").split()
PYTHON, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run_train(out, *flags):
    """The trainer in this process -> its last checkpoint."""
    train.main([*SMALL, "--out", str(out), *map(str, flags)])
    return last_checkpoint(out)


def run_script(*command, code=0):
    """A command as a user types it, in the repository's folder -> its output."""
    done = subprocess.run([str(word) for word in command], cwd=HERE, capture_output=True, text=True,
                          timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def last_checkpoint(out):
    return torch.load(sorted(Path(out).glob("ckpt-*.pt"))[-1], weights_only=True)


def log_lines(out, key="loss"):
    lines = Path(out, "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if key in line]


def one_line(capsys, main, flags):
    """A wrong call in this process -> what it said, which must be one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and error.endswith("\n") \
        and not printed, (printed, error)
    return error


# ---------------------------------------------------------------------------- comparisons

def assert_same_bits(a, b):
    """Nested dicts and lists of tensors, equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_bits(x, y)
    else:
        assert a == b


def assert_same_run(a, b):
    first, second = last_checkpoint(a), last_checkpoint(b)
    for part in ("step", "model", "ema", "optimizer"):
        assert_same_bits(first[part], second[part])


def apart(a, b):
    """How far two runs from one start are apart: averaged gradient (relative), weights (relative to
    the way they went).
    """
    torch.manual_seed(a["config"]["seed"])
    start = checkpoint.build_network(**a["network"]).state_dict()
    norm = lambda tensors: math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))
    moments = [[state.get("exp_avg", state.get("momentum"))
                for state in run["optimizer"]["state"].values()] for run in (a, b)]
    return (norm(p - q for p, q in zip(*moments)) / norm(moments[0]),
            norm(a["model"][n] - b["model"][n] for n in start)
            / norm(a["model"][n] - start[n] for n in start))


def same_to_rounding(a, b):
    """After a few steps: averaged gradients apart by under 1e-4, weights by under 1% of their way.

    1%, since Adam with eps = 1e-12 turns the rounding of a nearly zero gradient into a whole step.
    """
    gradient, weights = apart(a, b)
    return gradient < 1e-4 and weights < 1e-2


# ---------------------------------------------------------------------------- processes

TRAIN = HERE / "tests" / "little.py"
LAUNCHERS = {"one process": PYTHON, "two ranks": [*TORCHRUN, "--nproc_per_node=2"]}
RUN = [*SMALL, "--batch", "4", "--steps", "60", "--save-every", "2", "--set",
       "dropout=0.1", "--out"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def start_script(*command):
    """A command in the background, in a process group of its own; `.said()` is its output."""
    file = tempfile.NamedTemporaryFile()    # read by name: a seek here would move where it writes
    process = subprocess.Popen([str(word) for word in command], cwd=HERE, stdout=file,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    process.said = lambda: Path(file.name).read_text("utf-8", "replace")
    return process


# Starts processes that have torch imported already: torchrun takes seconds.
SERVER = multiprocessing.get_context("forkserver")
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
    """A Python script as `world` ranks, as torchrun would start them -> their output. 0: as one
    process without torchrun.
    """
    with socket.socket() as free, tempfile.NamedTemporaryFile() as file:
        free.bind(("127.0.0.1", 0))
        common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]),
                      WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        free.close()
        ranks = []
        for rank in range(max(1, world)):
            environment = common | dict(RANK=str(rank), LOCAL_RANK=str(rank)) if world else {}
            ranks.append(SERVER.Process(target=be_rank, args=(
                environment, file.name, str(script), [str(flag) for flag in flags])))
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(600)
        codes = [rank.exitcode for rank in ranks]
        for rank in ranks:
            rank.kill()
        said = Path(file.name).read_text("utf-8", "replace")
    # None: it hangs; below 0: it died of a signal.
    assert None not in codes and min(codes) >= 0 and max(codes) == code, said
    return said


def wait_for(condition, process=None, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and (process is None or process.poll() is None), \
            process and process.said()
        time.sleep(.01)


def processes(word):
    """Pids of the processes with `word` in their command line."""
    found = subprocess.run(["pgrep", "-f", str(word)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@contextlib.contextmanager
def full_disk(size=100_000):
    """No file may grow beyond `size` bytes: what a full disk does to whoever writes."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
