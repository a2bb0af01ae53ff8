"""What a run survives, by experiment: kills, signals, full disks, lost nodes, damaged pictures.

    python benchmarks/soak.py [kills restarts signals disk ranks nodes pictures time samples]

Each prints its numbers and ends in an error if a promise is broken. All of them take about an hour
on two CPU cores; `disk` and `nodes` need root on Linux (a tmpfs, two network namespaces). Short
forms of all are in test_all.py and tests/. The latest numbers are in docs/results.md.
"""
import io
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from checkpoint import read
from cli import fail
from data import Pictures
from tests.helpers import apart, assert_same_run, last_checkpoint, log_lines, same_to_rounding

TRAIN = ("--res 16 --batch 4 --compile off --sample-every 0 --log-every 10 "
         "--set dropout=0.1").split()          # in bf16 where the hardware has it
EXACT = ["--set", "bf16=off", "dropout=0"]      # after TRAIN, where runs differ by rounding alone
ENV = os.environ | {"OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


# ---------------------------------------------------------------------------- processes

def ranks(count, *more):
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={count}", *more]


def start(command, log, **more):
    """A command in a session of its own, its output appended to `log`."""
    return subprocess.Popen([str(word) for word in command], cwd=HERE, env=ENV,
                            stdout=open(log, "ab"), stderr=subprocess.STDOUT,
                            start_new_session=True, **more)


def finish(command, log, code=0):
    process = start(command, log)
    assert process.wait(1200) == code, f"{process.returncode}: {Path(log).read_text()[-3000:]}"


def run(command, seconds=1200):
    return subprocess.run([str(word) for word in command], cwd=HERE, env=ENV, capture_output=True,
                          text=True, timeout=seconds)


def processes(word):
    """Pids of all processes with `word` in their command line, but not this one."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() \
                    and str(word).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass
    return sorted(found)


def rank_pids(torchrun):
    """Pids of torchrun's ranks, by rank."""
    by_rank = {}
    for pid in processes("train.py"):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = [int(word[5:]) for word in environ if word.startswith(b"RANK=")]
            if int(stat[1]) == torchrun.pid and rank:
                by_rank[rank[0]] = pid
        except (OSError, IndexError):
            pass
    return by_rank


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"not within {seconds} s"
        time.sleep(.01)


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


# ---------------------------------------------------------------------------- one machine

def kill_some(process, rng):
    """Kill all of a torchrun's processes, one of its ranks, or torchrun alone -> which."""
    pids = rank_pids(process)
    who = rng.choice(["all", "rank 0", "rank 1", "torchrun"])
    if who[:4] == "rank" and int(who[5:]) in pids:
        kill(pids[int(who[5:])])
    elif who == "torchrun":                 # its ranks are orphans: they save and end
        kill(process.pid)
    else:
        who = "all"
        for pid in [process.pid, *pids.values()]:
            kill(pid)
    process.wait(120)
    return who


def kills(work, count=50, steps=1000):
    """kill -9 of everything, a rank, torchrun alone; every third while a file is written."""
    rng, flags = random.Random(0), [*TRAIN, "--steps", steps, "--save-every", "4"]
    unbroken, out, log = work / "unbroken", work / "killed", work / "log"
    finish([*ranks(2), "train.py", *flags, "--out", unbroken], log)
    command, killed, in_save, reads = [*ranks(2), "train.py", *flags, "--out", out], {}, 0, 0
    for k in range(count):
        process = start(command, log)
        if k % 3 == 0:
            wait_for(lambda: list(out.glob("*.part")) or process.poll() is not None)
            time.sleep(rng.uniform(0, .05))
        else:
            time.sleep(rng.uniform(0, 12))
        assert process.poll() is None, f"ended after {k} kills: {log.read_text()[-3000:]}"
        who = kill_some(process, rng)
        killed[who] = killed.get(who, 0) + 1
        in_save += bool(list(out.glob("*.part")))
        for file in out.glob("*.pt"):
            try:
                read(file)
                reads += 1
            except ValueError:              # an orphan that ends keeps only two checkpoints
                assert not file.exists(), f"unreadable: {file}"
    finish(command, log)
    assert_same_run(unbroken, out)
    wait_for(lambda: not processes(out), 90)    # ranks that lost torchrun as they started: 30 s
    assert not list(out.glob("*.part"))
    print(f"kills: {count} ({killed}), {in_save} left a half-written file; {reads} reads of "
          f"checkpoints, none failed; after {steps} steps weights, EMA and optimizer equal those "
          "of the unbroken run to the last bit; no process and no file is left over")


def restarts(work, steps=250):
    """torchrun --max-restarts=3, one rank killed three times: it recovers by itself."""
    flags = [*TRAIN, "--steps", steps, "--save-every", "10"]
    finish([*ranks(2), "train.py", *flags, "--out", work / "unbroken"], work / "log")
    out = work / "recovered"
    process = start([*ranks(2, "--max-restarts=3"), "train.py", *flags, "--out", out], work / "log")
    for i, rank in enumerate((1, 0, 1)):
        wait_for(lambda: list(out.glob(f"ckpt-*{i * 70 + 30:03d}.pt")))
        kill(rank_pids(process)[rank])
    assert process.wait(600) == 0
    assert_same_run(work / "unbroken", out)
    print("restarts: ranks 1, 0 and 1 killed, torchrun --max-restarts=3 exits 0, same bits as the "
          "unbroken run")


SIGNALS = (     # name, launcher, signal, who gets it
    ("python, SIGTERM", "python", signal.SIGTERM, "main"),
    ("python, Ctrl-C", "python", signal.SIGINT, "group"),
    ("python with 2 loaders, Ctrl-C to all", "python", signal.SIGINT, "group"),
    ("python with 2 loaders, SIGTERM to all", "python", signal.SIGTERM, "group"),
    ("torchrun, SIGTERM to one rank", "torchrun", signal.SIGTERM, "rank"),
    ("torchrun, SIGTERM to torchrun", "torchrun", signal.SIGTERM, "main"),
    ("torchrun, Ctrl-C", "torchrun", signal.SIGINT, "group"),
    ("torchrun shielded, SIGTERM to all", "shielded", signal.SIGTERM, "all"))


def send(number, whom, process, out):
    """The signal to the process, to its group, to its second rank, or to all that work in `out`."""
    if whom == "all":
        for pid in processes(out):
            kill(pid, number)
    elif whom == "group":
        os.killpg(process.pid, number)
    else:
        kill(rank_pids(process)[1] if whom == "rank" else process.pid, number)


def signals(work, steps=150):
    """SIGTERM and Ctrl-C, to one process and under torchrun: saved, code 0, and resumed."""
    flags = [*TRAIN, "--steps", steps, "--save-every", "1000"]
    launchers = dict(python=[sys.executable], torchrun=ranks(2),
                     shielded=ranks(2, "--signals-to-handle=SIGQUIT"))
    for name in ("python", "torchrun"):
        finish([*launchers[name], "train.py", *flags, "--out", work / name], work / "log")
    for name, launcher, number, whom in SIGNALS:
        out, log = work / re.sub(r"\W+", "-", name), work / re.sub(r"\W+", "-", name + " log")
        loaders = ["--set", "workers=2"] if "loaders" in name else []
        command = [*launchers[launcher], "train.py", *flags, "--out", out]
        shield = (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)) \
            if launcher == "shielded" else None
        process = start([*command, *loaders], log, preexec_fn=shield)
        wait_for(lambda: (out / "log.jsonl").exists() and len(log_lines(out)) >= 3)
        sent = time.time()
        send(number, whom, process, out)
        code = process.wait(60)
        took = time.time() - sent
        wait_for(lambda: not processes(out), 15)
        step = last_checkpoint(out)["step"]
        files = {file.name for file in out.glob("*.pt")} - {"ckpt-00000050.pt"}     # the first one
        assert files | {"ckpt-00000050.pt"} == {f"ckpt-{step:08d}.pt", "model.pt",
                                                "ckpt-00000050.pt"}
        assert 20 <= step < steps and not list(out.glob("*.part"))
        assert f"stopped and saved at step {step}" in log.read_text()
        traces = log.read_text().count("Traceback")
        finish(command, log)
        assert_same_run(work / ("python" if launcher == "python" else "torchrun"), out)
        print(f"signals: {name}: exit {code}, {took:.2f} s, saved at step {step}, {traces} "
              "tracebacks; resumed to the same bits", flush=True)


def disk(work):
    """A tmpfs too small for a third checkpoint, enlarged later; a read-only one."""
    mount = work / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=85m", "tmpfs", mount], check=True)
    try:
        full(work, mount)
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        for out in (mount / "run", mount / "new", work / "missing" / "run"):
            done = run([sys.executable, "train.py", *TRAIN, "--steps", "500", "--out", out])
            assert done.returncode == 2 and done.stderr.count("\n") == 1
            assert "step" not in done.stdout
            print("disk:", done.stderr.strip().replace(str(work), "..."))
    finally:
        subprocess.run(["umount", mount])


def full(work, mount):
    out, log = mount / "run", work / "log"
    flags = [*TRAIN, "--steps", "400", "--save-every", "20"]
    process, most, complete = start([sys.executable, "train.py", *flags, "--out", out], log), 0, []
    while process.poll() is None:
        try:
            most = max(most, sum(file.stat().st_size for file in out.iterdir()))
        except OSError:
            pass
        if not complete and log.read_text().count("No space left") >= 4:
            complete = [file.name for file in sorted(out.glob("*.pt"))]
            for name in complete:
                read(out / name)
            subprocess.run(["mount", "-o", "remount,size=400m", mount], check=True)
        time.sleep(.005)
    lines = [line for line in re.split("[\r\n]", log.read_text()) if "No space" in line]
    assert process.returncode == 0 and complete and "Traceback" not in log.read_text()
    sizes = {file.name: file.stat().st_size for file in out.glob("*.pt")}
    one = max(sizes.values())
    assert len(sizes) == 3 and most < 3 * one + 2 * sizes["model.pt"] + 100_000
    finish([sys.executable, "train.py", *flags, "--out", work / "unbroken"], log)
    assert_same_run(work / "unbroken", out)
    print(f"disk: full at {len(lines)} saves, one line each ({lines[0].split('/')[0]}..."
          f"{lines[0][-70:]}); then {complete} were complete; once the disk was larger, the run "
          "saved again and ended with the unbroken run's bits. Largest use of the disk: "
          f"{most / one:.2f} checkpoints of {one / 1e6:.1f} MB, with model.pt of "
          f"{sizes['model.pt'] / 1e6:.1f} MB")


# A trainer that writes down which pictures it reads: their running numbers, and their files.
WATCHED = """
import os, sys
sys.path.insert(0, {here!r})
import data, run, train
original, folder = data.Pictures.__getitem__, {folder!r}
def watched(self, n):
    epoch, place = divmod(n, len(self.names))
    item = original(self, n)
    with open(f"{{folder}}/{{os.getpid()}}", "a") as file:
        file.write(f"{{n}} {{self.names[self.order[1][place]]}}\\n")
    return item
data.Pictures.__getitem__ = watched
run.run_command(train.main)
"""


def ranks_(work):
    """1, 2 and 4 ranks; a checkpoint of 2 resumed by 1 and by 4; each picture once an epoch."""
    pictures, log = work / "pictures", work / "log"
    pictures.mkdir()
    for i in range(96):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{i:03d}.png")
    flags = [*TRAIN, *EXACT, "--data", pictures, "--save-every", "30", "--steps"]
    finish([*ranks(1), "train.py", *flags, 8, "--out", work / "whole"], log)
    one = last_checkpoint(work / "whole")
    for first, then in ((2, 2), (4, 4), (2, 1), (2, 4)):
        out = work / f"{first}-then-{then}"
        finish([*ranks(first), "train.py", *flags, 4, "--out", out], log)
        finish([*ranks(then), "train.py", *flags, 8, "--out", out], log)
        both = last_checkpoint(out)
        assert same_to_rounding(one, both)
        print(f"ranks: {first} to step 4, {then} to step 8, against one process: "
              + "averaged gradient {:.1e}, weights {:.1e} apart (relative)".format(
                  *apart(one, both)), flush=True)
    for count in (1, 4):
        each_once(work, flags, count)


def each_once(work, flags, count):
    """2 ranks to step 30, `count` ranks from there to step 72: 3 epochs of 96 pictures."""
    watched, out, script = (work / f"{name}-{count}" for name in ("watched", "resumed", "script"))
    watched.mkdir()
    script.write_text(WATCHED.format(here=str(HERE), folder=str(watched)))
    finish([*ranks(2), script, *flags, 30, "--out", out], work / "log")
    finish([*ranks(count), script, *flags, 72, "--out", out], work / "log")
    lines = [line.split() for file in watched.iterdir() for line in file.read_text().splitlines()]
    numbers = sorted(int(n) for n, _ in lines)
    for n in range(16):     # each process also reads these for its reports, the first rank of each
        for _ in range(2 + count + 2):      # command once more, to see whether pictures are there
            numbers.remove(n)
    assert numbers == list(range(72 * 4)), "a picture twice, or skipped"
    files = {int(n): name for n, name in lines}
    for epoch in range(3):
        assert len({files[n] for n in range(96 * epoch, 96 * epoch + 96)}) == 96
    print(f"ranks: 2 ranks to step 30, {count} from there to 72: {len(numbers)} pictures read, "
          "each of 96 files exactly once in each of 3 epochs")


# ---------------------------------------------------------------------------- two machines

RENDEZVOUS = {"c10d": ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500"],
              "static": ["--master-addr=10.77.0.1"]}


def command(line):
    subprocess.run(line.split(), check=True)


def connect():
    """Two network namespaces joined by a cable."""
    for i in (0, 1):
        command(f"ip netns add soak{i}")
        folder = Path(f"/etc/netns/soak{i}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
    command("ip link add cable0 type veth peer name cable1")
    for i in (0, 1):
        command(f"ip link set cable{i} netns soak{i}")
        command(f"ip -n soak{i} addr add 10.77.0.{i + 1}/24 dev cable{i}")
        for device in ("lo", f"cable{i}"):
            command(f"ip -n soak{i} link set {device} up")


def on_node(i, command, log):
    """A command in network namespace i, with a host name of its own."""
    words = " ".join(str(word) for word in command)
    return subprocess.Popen(
        ["ip", "netns", "exec", f"soak{i}", "unshare", "--uts", "sh", "-c",
         f"hostname node{i}; exec {words}"], cwd=HERE, env=ENV | dict(NODE=str(i)),
        stdout=open(log, "ab"), stderr=subprocess.STDOUT, start_new_session=True)


def on_both(log, kind, flags, *more):
    """train.py on two nodes, one rank each -> its two processes."""
    return [on_node(i, [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *RENDEZVOUS[kind], *more,
                        *([f"--node-rank={i}"] * (kind == "static")), "train.py", *flags],
                    f"{log}-{i}") for i in (0, 1)]


def finish_both(*arguments):
    for process in on_both(*arguments):
        assert process.wait(300) == 0


def nodes(work):
    """Two nodes: as one; with the network cut; with a rank killed."""
    flags = [*TRAIN, *EXACT, "--set", "timeout=0.5", "--save-every", "40", "--steps"]
    try:
        connect()
        same_as_one(work, [*flags, "8", "--out"])
        finish([*ranks(2), "train.py", *flags, "200", "--out", work / "unbroken"], work / "log")
        cut_off(work, [*flags, "200", "--out", work / "cut"])
        # Ranks come back at different times: on a busy machine half a minute is too short to meet.
        one_killed(work, [*flags, "200", "--out", work / "killed", "--set", "timeout=2"])
    finally:
        for i in (0, 1):
            subprocess.run(["ip", "netns", "del", f"soak{i}"])
            shutil.rmtree(f"/etc/netns/soak{i}", ignore_errors=True)


def same_as_one(work, flags):
    finish([sys.executable, "train.py", *flags, work / "one"], work / "log")
    finish([*ranks(2), "train.py", *flags, work / "two-ranks"], work / "log")
    one = last_checkpoint(work / "one")
    for kind in RENDEZVOUS:
        finish_both(work / kind, kind, [*flags, work / f"{kind}-run"])
        two = last_checkpoint(work / f"{kind}-run")
        assert same_to_rounding(one, two)
        assert_same_run(work / f"{kind}-run", work / "two-ranks")
        print(f"nodes: 2 nodes with a rank each ({kind} rendezvous), 8 steps: the bits of 2 ranks "
              "on one node; against one process averaged gradient {:.1e}, weights {:.1e} "
              "apart".format(*apart(one, two)), flush=True)


def cut_off(work, flags):
    """The network is cut: both nodes end and name each other, and resume later."""
    pair = on_both(work / "cut-log", "static", flags)
    wait_for(lambda: list((work / "cut").glob("ckpt-*40.pt")))
    command("ip -n soak1 link set cable1 down")
    cut, took = time.time(), []
    for process in pair:
        assert process.wait(120) != 0
        took.append(time.time() - cut)
    lines = [re.search(r"rank \d on node\d: no word.*checkpoint",
                       (work / f"cut-log-{i}").read_text())[0] for i in (0, 1)]
    assert max(took) < 30 + 5
    assert "from rank 1 on node1;" in lines[0] and "from rank 0 on node0;" in lines[1]
    assert not processes(work / "cut")
    command("ip -n soak1 link set cable1 up")
    finish_both(work / "cut-log", "static", flags)
    assert_same_run(work / "unbroken", work / "cut")
    print(f"nodes: network cut, timeout=0.5 (30 s): the nodes end after {took[0]:.1f} and "
          f"{took[1]:.1f} s with '{lines[0]}' and '{lines[1]}'; joined again, both resume to the "
          "unbroken run's bits", flush=True)


def one_killed(work, flags):
    """One rank is killed on its node, under --max-restarts=3: both nodes go on by themselves."""
    pair = on_both(work / "killed-log", "static", flags, "--max-restarts=3")
    wait_for(lambda: list((work / "killed").glob("ckpt-*40.pt")))
    time.sleep(1)
    for pid in processes(work / "killed"):
        environment = Path(f"/proc/{pid}/environ").read_text().split("\0")
        if {"NODE=1", "RANK=1"} <= set(environment):
            kill(pid)
            break
    else:
        raise AssertionError("no rank 1 on node 1")
    for process in pair:
        assert process.wait(300) == 0
    assert_same_run(work / "unbroken", work / "killed")
    print("nodes: rank 1 killed on its node, --max-restarts=3: both continue by themselves, to the "
          "same bits")


# ---------------------------------------------------------------------------- pictures

def png(width, height, depth=1):
    """A black PNG that is small as a file, whatever its size as a picture."""
    def chunk(name, data):
        return (struct.pack(">I", len(data)) + name + data
                + struct.pack(">I", zlib.crc32(name + data)))

    row, packer = bytes(1 + (width * depth + 7) // 8), zlib.compressobj(9)
    rows = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows)
            + chunk(b"IEND", b""))


def sound_pictures(rng):
    """{file name: its bytes}, sound pictures of every format and mode that the loader reads."""
    found = {}
    rgb = Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (40, 44), dtype=np.uint16)
    frames = [Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(3)]
    animated = dict(save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image, more in [
            ("rgb.png", rgb, {}), ("rgb.jpg", rgb, dict(quality=80)),
            ("turned.jpg", rgb, dict(exif=exif)), ("progressive.jpg", rgb, dict(progressive=True)),
            ("cmyk.jpg", rgb.convert("CMYK"), {}),
            ("lossy.webp", rgb, {}), ("lossless.webp", rgb, dict(lossless=True)),
            ("rgb.bmp", rgb, {}), ("rgb.gif", rgb, {}), ("rgb.tif", rgb, {}),
            ("lzw.tif", rgb, dict(compression="tiff_lzw")),
            ("jpeg.tiff", rgb, dict(compression="jpeg")),
            ("deflate.tif", rgb, dict(compression="tiff_deflate")),
            ("alpha.png", rgb.convert("RGBA"), {}), ("grey.png", rgb.convert("L"), {}),
            ("grey-alpha.png", rgb.convert("LA"), {}), ("bits.png", rgb.convert("1"), {}),
            ("palette.png", rgb.convert("P"), dict(transparency=3)),
            ("deep.png", Image.fromarray(deep), {}), ("deep.tif", Image.fromarray(deep), {}),
            ("whole.tif", Image.fromarray(deep.astype(np.int32)), {}),
            ("float.tif", Image.fromarray(rng.random((40, 44), dtype=np.float32)), {}),
            ("lab.tif", rgb.convert("LAB"), {}),
            *((f"animated.{kind}", frames[0], animated) for kind in ("gif", "png", "webp")),
            ("pages.tif", frames[0], animated)]:
        file, ending = io.BytesIO(), name.split(".")[1]
        image.save(file, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **more)
        found[name] = file.getvalue()
    return found


def write_damaged(folder, count, rng):
    """`count` damaged files, and the special cases once each."""
    sound = sound_pictures(rng)
    names = list(sound)
    for i in range(count):
        name = names[rng.integers(len(names))]
        raw, stem, ending = bytearray(sound[name]), *name.split(".")
        kind = rng.integers(7)
        if kind == 0:                                   # cut short
            raw = raw[:rng.integers(len(raw))]
        elif kind in (1, 2):                            # flipped bits, few or many
            for _ in range(1 if kind == 1 else rng.integers(2, 200)):
                raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        elif kind == 3:                                 # damage where formats keep their sizes
            for _ in range(rng.integers(1, 9)):
                raw[rng.integers(min(64, len(raw)))] = rng.integers(256)
        elif kind == 4:                                 # wrong ending
            ending = ["png", "JPG", "webp", "gif", "bmp", "tif"][rng.integers(6)]
        elif kind == 5:                                 # a piece out, or in
            at = rng.integers(len(raw))
            raw[at:at + rng.integers(100)] = rng.bytes(int(rng.integers(100)))
        else:                                           # nothing of a picture
            raw = rng.bytes(int(rng.integers(200)))
        (folder / f"{i:05d}-{stem}.{ending}").write_bytes(raw)
    write_special(folder, sound["rgb.png"])


def write_special(folder, sound):
    """What is no picture, what is too large, what may not be read, and odd names."""
    special = folder / "special"
    special.mkdir()
    (special / "empty.png").touch()
    (special / "folder.png").mkdir()
    Image.new("RGB", (20, 20)).save(special / "folder.png" / "inside.png")
    (special / "loop.png").symlink_to("loop.png")
    (special / "dangling.jpg").symlink_to("nowhere")
    (special / "circle").symlink_to(folder)
    os.mkfifo(special / "pipe.png")
    with open(special / "sparse.webp", "wb") as file:   # a declared size of 20 GB
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(20 << 30)
    (special / "bomb-30000x30000.png").write_bytes(png(30_000, 30_000))
    (special / "bomb-12000x12000.png").write_bytes(png(12_000, 12_000))
    (special / "thin-1x60000.png").write_bytes(png(1, 60_000, depth=8))
    (special / "thin-1x4000000.png").write_bytes(png(1, 4_000_000, depth=8))
    largest = (8192, 8192)
    (special / "largest-grey.png").write_bytes(png(*largest, depth=8))
    Image.new("RGBA", largest, (9, 9, 9, 9)).save(special / "largest-alpha.png", compress_level=1)
    deep, floats = np.full(largest, 777, np.uint16), np.full(largest, .5, np.float32)
    Image.fromarray(deep).save(special / "largest-deep.png", compress_level=1)
    Image.fromarray(floats).save(special / "largest-float.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(special / "nan.tif")
    (special / "forbidden.png").write_bytes(sound)
    os.chmod(special / "forbidden.png", 0)
    (special / "shut").mkdir()
    (special / "shut" / "in.png").write_bytes(sound)
    os.chmod(special / "shut", 0)
    (special / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("größe.PNG", "花.png", "a\nb.png", "\x1b[31mred.png", "\u202egnp.png",
                 "'; rm -rf .png", " .png"):
        (special / name).write_bytes(sound)
        (special / ("bad" + name)).write_bytes(b"no picture")
    with open(os.fsencode(special) + b"/latin-\xe9.png", "wb") as file:
        file.write(b"no picture")


READER = """
import resource, sys, time
sys.path.insert(0, {here!r})
sys.stdout.reconfigure(errors="backslashreplace")
import data, listing
data.CACHE_BYTES = 0
dataset = data.Pictures({folder!r}, 64)
slowest = (0, "")
for i, name in enumerate(dataset.names):
    begin = time.time()
    dataset.picture(i)
    slowest = max(slowest, (time.time() - begin, listing.printable(name)))
for name in sorted(dataset.broken):
    if "special" in name:
        print("   ", listing.printable(name), "|", dataset.broken[name])
kinds = {{}}
for why in dataset.broken.values():
    kinds[why.split(":")[0]] = kinds.get(why.split(":")[0], 0) + 1
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"pictures: {{len(dataset.names)}} files, {{len(dataset.broken)}} broken: {{kinds}}")
print(f"pictures: peak memory {{peak:.0f}} MB; slowest {{slowest[0]:.2f}} s, for {{slowest[1]}}")
"""


def pictures(work, count=12_000):
    """Damaged files by the thousand: read, trained on, and in zips."""
    rng, folder = np.random.default_rng(0), work / "pictures"
    folder.mkdir()
    write_damaged(folder, count, rng)
    # Root may read everything, but not without its capabilities.
    as_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] * (os.getuid() == 0)
    reader = READER.format(here=str(HERE), folder=str(folder))
    done = run([*as_user, sys.executable, "-c", reader], 1800)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    print(done.stdout, end="", flush=True)
    for file in sorted(folder.glob("[0-9]*"))[count // 4:]:
        file.unlink()
    train_on_damaged(work, folder, count // 4, as_user, rng)
    os.chmod(folder / "special" / "shut", 0o700)
    damaged_zips(work, rng)


def train_on_damaged(work, folder, count, as_user, rng):
    """Beside as many sound pictures they are skipped and named; without those the run ends."""
    for i in range(count):
        noise = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"sound-{i:05d}.png")
    steps = 2 * count // 32 + 20            # two ranks with a loader each read all of them
    command = [*as_user, *ranks(2), "train.py", *TRAIN, "--batch", "32", "--steps", steps,
               "--data", folder, "--set", "workers=1"]
    finish([*command, "--out", work / "run"], work / "log")
    log = (work / "log").read_text()
    named = re.findall(r"skipped (.*?): ", log)
    lines = (work / "run" / "broken.txt").read_text().splitlines()
    assert len(named) == len(set(named)) == len(lines) and "Traceback" not in log
    (summary,) = [line for line in log.splitlines() if "could not be read and were" in line]
    print("pictures: training on them and as many sound ones, one epoch, 2 ranks with a loader "
          f"each: {len(named)} named, each once; '{summary[:90]}'", flush=True)
    for file in folder.glob("sound-*"):
        file.unlink()
    for file in sorted(folder.glob("*[a-z].*"))[:count // 4]:
        file.write_bytes(b"no picture")
    done = run([*command, "--out", work / "half"])
    line = [line for line in done.stderr.splitlines() if "more than half" in line]
    assert done.returncode == 1 and len(line) == 1 and not list((work / "half").glob("*.pt"))
    print("pictures:", line[0].replace(str(work), "...")[:150], flush=True)


def damaged_zips(work, rng, count=1000):
    """Names that lead out of the zip, damage in its directory and anywhere."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for i, (name, raw) in enumerate(sound_pictures(rng).items()):
            file.writestr(["../", "/", "../../etc/", "a/./", "a\\", "C:/"][i % 6] + name, raw)
    whole, refused, broken, sound = archive.getvalue(), 0, 0, 0
    for i in range(count):
        bad, path = bytearray(whole), work / f"{i}.zip"
        for _ in range(0 if i == 0 else rng.integers(1, 20)):
            at = -1 - rng.integers(2500) if i % 2 else rng.integers(len(bad))
            bad[at] ^= 1 << rng.integers(8)
        path.write_bytes(bad)
        try:
            dataset = Pictures(path, 16)
            for n in range(len(dataset.names)):
                dataset[n]
            broken, sound = broken + bool(dataset.broken), sound + (not dataset.broken)
        except ValueError as error:
            assert str(error).startswith("--data") and "\n" not in str(error)
            refused += 1
        path.unlink()
    print(f"pictures: {count} zips with ../ and absolute names, {count - 1} of them damaged: "
          f"{refused} refused in one line, {broken} read except for broken pictures, {sound} read "
          "completely")


# ---------------------------------------------------------------------------- long runs, samples

def time_(work, steps=3000):
    """Memory and open files over 3,000 steps with saves, grids and loaders."""
    out, rows = work / "run", {}
    process = start([sys.executable, "train.py", *TRAIN, "--steps", steps, "--save-every", "50",
                     "--sample-every", "300", "--set", "workers=1", "--out", out], work / "log")
    while process.poll() is None:
        try:
            step = log_lines(out)[-1]["step"] // 100 * 100
            children = [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir()
                        for pid in (task / "children").read_text().split()]
            kilobytes = [re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]
                         for pid in (process.pid, *children)]
            own, *others = [int(number) / 1024 for number in kilobytes]
            files = len(os.listdir(f"/proc/{process.pid}/fd"))
            rows.setdefault(step, (own, sum(others), files))
        except (OSError, IndexError, TypeError):
            pass
        time.sleep(.2)
    assert process.returncode == 0
    for step in (100, 300, 600, 1000, 1500, 2000, 2500, 2900):
        own, loader, files = rows[step]
        print(f"time: step {step}: {own:.0f} MB, loader {loader:.0f} MB, {files} open files")
    late = [row for step, row in rows.items() if step >= 300]
    assert max(row[0] for row in late) < 1.05 * rows[300][0] + 20
    assert max(row[2] for row in late) <= rows[300][2] + 8
    wait_for(lambda: not processes(out), 15)
    assert not list(out.glob("*.part"))


def samples(work):
    """1,000 pictures, killed on the way three times; two ranks take turns with one."""
    out, unbroken, log = work / "killed", work / "unbroken", work / "log"
    finish([sys.executable, "train.py", *TRAIN, "--steps", "20", "--out", work / "run"], log)
    flags = ["sample.py", "--ckpt", work / "run/model.pt", "--n", "1000", "--steps", "8",
             "--guidance", "2"]
    finish([sys.executable, *flags, "--out", unbroken], log)
    times = lambda: {file.name: file.stat().st_mtime_ns for file in out.glob("0*.png")}
    counts, one, two = [], [sys.executable], [*ranks(2), "--"]
    for launcher, until in ((one, 250), (two, 500), (one, 800)):
        process = start([*launcher, *flags, "--out", out], log)
        wait_for(lambda: len(times()) >= until)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in processes(out):
            kill(pid)
        process.wait()
        time.sleep(.5)
        before = times()
        counts.append(len(before))
    finish([sys.executable, *flags, "--out", out], log)
    a, b = (np.load(folder / "samples.npz")["arr_0"] for folder in (unbroken, out))
    assert np.array_equal(a, b) and len(a) == 1000
    for name in before:
        assert (unbroken / name).read_bytes() == (out / name).read_bytes()
    names = [{file.name for file in folder.iterdir()} for folder in (unbroken, out)]
    assert names[0] == names[1]
    kept = sum(times()[name] == time for name, time in before.items())
    print(f"samples: killed at {counts} of 1,000 pictures; {kept} of the last {len(before)} were "
          "not drawn again; all 1,000 equal those of the unbroken run, and no other file is there")


EXPERIMENTS = dict(kills=kills, restarts=restarts, signals=signals, disk=disk, ranks=ranks_,
                   nodes=nodes, pictures=pictures, time=time_, samples=samples)

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in sys.argv[1:] or EXPERIMENTS:
        if name not in EXPERIMENTS:
            fail(f"{name}: must be one of {', '.join(EXPERIMENTS)}")
        begin = time.time()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            try:
                EXPERIMENTS[name](Path(folder))
            finally:
                for pid in processes(folder):
                    kill(pid)
        print(f"{name}: held, {time.time() - begin:.0f} s", flush=True)
