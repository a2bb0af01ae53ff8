"""What a run survives, shown by experiment: kills, signals, full disks, lost nodes, bad pictures.

    python benchmarks/soak.py [kills restarts signals disk ranks nodes pictures time samples]

Each prints its figures and ends in an error if a promise is broken. All of them take about an hour
on two CPU cores; `disk` and `nodes` need root on Linux (a tmpfs, two network namespaces). Short
forms of all stand in test_all.py. The figures of the last time are in benchmarks/RESULTS.md.
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
import torch
from PIL import Image

HERE = Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
from checkpoint import read
from test_all import apart, assert_same_bits, last_checkpoint, log_lines, same_to_rounding

TRAIN = ("--res 16 --batch 4 --bf16 on --compile off --sample-every 0 --log-every 10 "
         "--dropout 0.1").split()
EXACT = ["--bf16", "off", "--dropout", "0"]     # after TRAIN, where runs differ by rounding alone
ENV = os.environ | {"OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def ranks(count, *more):
    return [*TORCHRUN, "--standalone", f"--nproc_per_node={count}", *more]


def start(command, log, **more):
    """A command in a session of its own, its output appended to `log`."""
    return subprocess.Popen([str(word) for word in command], cwd=HERE, env=ENV, stdout=open(log, "ab"),
                            stderr=subprocess.STDOUT, start_new_session=True, **more)


def finish(command, log, code=0):
    process = start(command, log)
    assert process.wait(1200) == code, f"{process.returncode}: {Path(log).read_text()[-3000:]}"
    return process


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
        assert time.time() < end, "waited in vain"
        time.sleep(.01)


def kill(pid, number=signal.SIGKILL):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def assert_same_run(a, b):
    first, second = last_checkpoint(a), last_checkpoint(b)
    for part in ("step", "model", "ema", "optimizer"):
        assert_same_bits(first[part], second[part])


def kills(work, count=50, steps=1000):
    """kill -9 of everything, of one rank, of torchrun alone; every third while a file is written."""
    rng, flags = random.Random(0), [*TRAIN, "--steps", steps, "--save-every", "4"]
    unbroken, out, log = work / "unbroken", work / "killed", work / "log"
    finish([*ranks(2), "train.py", *flags, "--out", unbroken], log)
    command, done, in_save, whom, read_ok = [*ranks(2), "train.py", *flags, "--out", out], 0, 0, {}, 0
    while done < count:
        process = start(command, log)
        if done % 3 == 0:
            wait_for(lambda: list(out.glob("*.part")) or process.poll() is not None)
            time.sleep(rng.uniform(0, .05))
        else:
            time.sleep(rng.uniform(0, 12))
        victims = rank_pids(process)
        who = rng.choice(["all", "rank 0", "rank 1", "torchrun"])
        if process.poll() is not None:
            raise AssertionError(f"an end of its own after {done} kills: {log.read_text()[-3000:]}")
        if who[:4] == "rank" and int(who[5:]) in victims:
            kill(victims[int(who[5:])])
        elif who == "torchrun":             # its ranks become orphans: they save and leave
            kill(process.pid)
        else:
            who = "all"
            for pid in [process.pid, *victims.values()]:
                kill(pid)
        process.wait(120)
        done, whom[who] = done + 1, whom.get(who, 0) + 1
        in_save += bool(list(out.glob("*.part")))
        for file in out.glob("*.pt"):
            try:
                read(file)
                read_ok += 1
            except ValueError:              # an orphan, on its way out, keeps but two checkpoints
                assert not file.exists(), f"unreadable: {file}"
    finish(command, log)
    assert_same_run(unbroken, out)
    wait_for(lambda: not processes(out), 30)
    assert not list(out.glob("*.part"))
    print(f"kills: {done} ({whom}), {in_save} left a half-written file; {read_ok} reads of "
          f"checkpoints, none failed; after {steps} steps weights, EMA and optimizer are the unbroken "
          "run's to the last bit; no process and no file is left over")


def restarts(work, steps=250):
    """torchrun --max-restarts=3, one rank killed three times: it heals with no hand."""
    flags = [*TRAIN, "--steps", steps, "--save-every", "10"]
    finish([*ranks(2), "train.py", *flags, "--out", work / "unbroken"], work / "log")
    out = work / "healed"
    process = start([*ranks(2, "--max-restarts=3"), "train.py", *flags, "--out", out], work / "log")
    for i, victim in enumerate((1, 0, 1)):
        wait_for(lambda: list(out.glob(f"ckpt-*{i * 70 + 30:03d}.pt")))
        kill(rank_pids(process)[victim])
    assert process.wait(600) == 0
    assert_same_run(work / "unbroken", out)
    print("restarts: rank 1, 0 and 1 killed, torchrun --max-restarts=3 exits 0, same bits as unbroken")


def signals(work, steps=150):
    """SIGTERM and Ctrl-C, to one process and under torchrun: saved, code 0, and it goes on."""
    flags = [*TRAIN, "--steps", steps, "--save-every", "1000"]
    for launcher in ([sys.executable], ranks(2)):
        finish([*launcher, "train.py", *flags, "--out", work / f"unbroken{len(launcher)}"], work / "log")
    for name, launcher, number, whom in (
            ("python, SIGTERM", [sys.executable], signal.SIGTERM, "main"),
            ("python, Ctrl-C", [sys.executable], signal.SIGINT, "group"),
            ("python with 2 loaders, Ctrl-C to all", [sys.executable], signal.SIGINT, "group"),
            ("python with 2 loaders, SIGTERM to all", [sys.executable], signal.SIGTERM, "group"),
            ("torchrun, SIGTERM to one rank", ranks(2), signal.SIGTERM, "rank"),
            ("torchrun, SIGTERM to torchrun", ranks(2), signal.SIGTERM, "main"),
            ("torchrun, Ctrl-C", ranks(2), signal.SIGINT, "group"),
            ("torchrun shielded, SIGTERM to all", None, signal.SIGTERM, "all")):
        out, log = work / re.sub(r"\W+", "-", name), work / re.sub(r"\W+", "-", name + " log")
        shield = launcher is None
        launcher = launcher or ranks(2, "--signals-to-handle=SIGQUIT")
        command = [*launcher, "train.py", *flags, "--out", out,
                   *(["--workers", "2"] if "loaders" in name else [])]
        before = (lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)) if shield else None
        process = start(command, log, preexec_fn=before)
        wait_for(lambda: (out / "log.jsonl").exists() and len(log_lines(out)) >= 3)
        told = time.time()
        if whom == "all":
            for pid in processes(out):
                kill(pid, number)
        elif whom == "group":
            os.killpg(process.pid, number)
        else:
            kill(rank_pids(process)[1] if whom == "rank" else process.pid, number)
        code = process.wait(60)
        took = time.time() - told
        wait_for(lambda: not processes(out), 15)
        files, step = sorted(file.name for file in out.glob("*.pt")), last_checkpoint(out)["step"]
        assert files == [f"ckpt-{step:08d}.pt", "model.pt"] and 30 <= step < steps and not list(out.glob("*.part"))
        assert f"stopped and saved at step {step}" in log.read_text()
        said = log.read_text().count("Traceback")
        finish([*launcher, "train.py", *flags, "--out", out], log)
        assert_same_run(work / f"unbroken{min(len(launcher), len(ranks(2)))}", out)
        print(f"signals: {name}: exit {code}, {took:.2f} s, saved at step {step}, {said} tracebacks; "
              "resumed to the same bits", flush=True)


def disk(work):
    """A tmpfs too small for a third checkpoint, made larger later; a read-only one."""
    mount = work / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=85m", "tmpfs", mount], check=True)
    try:
        out, log, flags = mount / "run", work / "log", [*TRAIN, "--steps", "400", "--save-every", "20"]
        command = [sys.executable, "train.py", *flags, "--out", out]
        process, most, grown = start(command, log), 0, False
        while process.poll() is None:
            try:
                most = max(most, sum(file.stat().st_size for file in out.iterdir()))
            except OSError:
                pass
            if not grown and log.read_text().count("No space left") >= 4:
                whole = [file.name for file in sorted(out.glob("*.pt"))]
                for name in whole:
                    read(out / name)
                subprocess.run(["mount", "-o", "remount,size=400m", mount], check=True)
                grown = True
            time.sleep(.005)
        lines = [line for line in re.split("[\r\n]", log.read_text()) if "No space" in line]
        assert process.returncode == 0 and grown and "Traceback" not in log.read_text()
        sizes = {file.name: file.stat().st_size for file in out.glob("*.pt")}
        one = max(sizes.values())
        assert len(sizes) == 3 and most < 3 * one + 2 * sizes["model.pt"] + 100_000
        finish([sys.executable, "train.py", *flags, "--out", work / "unbroken"], log)
        assert_same_run(work / "unbroken", out)
        print(f"disk: full at {len(lines)} saves, one line each ({lines[0].split('/')[0]}...{lines[0][-70:]}); "
              f"then {whole} were whole; grown, the run saved again and ended with the unbroken run's bits. "
              f"Most on the disk: {most / one:.2f} checkpoints of {one / 1e6:.1f} MB, model.pt of "
              f"{sizes['model.pt'] / 1e6:.1f} MB among it")
        subprocess.run(["mount", "-o", "remount,ro", mount], check=True)
        for flags in (["--out", out], ["--out", mount / "new"], ["--out", work / "missing" / "run"]):
            done = subprocess.run([sys.executable, "train.py", *TRAIN, "--steps", "500", *map(str, flags)],
                                  cwd=HERE, env=ENV, capture_output=True, text=True)
            assert done.returncode == 2 and done.stderr.count("\n") == 1 and "step" not in done.stdout
            print("disk:", done.stderr.strip().replace(str(work), "..."))
    finally:
        subprocess.run(["umount", mount])


# A trainer that writes down which pictures it was given: picture numbers, not files.
WATCHED = """
import os, sys
sys.path.insert(0, {here!r})
import data, train
honest, folder = data.Pictures.__getitem__, {folder!r}
def watched(self, n):
    epoch, place = divmod(n, len(self.names))
    item = honest(self, n)
    with open(f"{{folder}}/{{os.getpid()}}", "a") as file:
        file.write(f"{{n}} {{self.names[self.order[1][place]]}}\\n")
    return item
data.Pictures.__getitem__ = watched
try:
    train.main()
finally:
    if train.dist.is_initialized():
        train.dist.destroy_process_group()
"""


def ranks_(work):
    """1, 2 and 4 ranks; a checkpoint of 2 goes on with 1 and with 4; each picture once an epoch."""
    pictures, log = work / "pictures", work / "log"
    pictures.mkdir()
    for i in range(96):
        noise = np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(noise).save(pictures / f"{i:03d}.png")
    flags = [*TRAIN, *EXACT, "--data", pictures, "--save-every", "30", "--steps"]
    for count in (1, 2, 4):
        finish([*ranks(count), "train.py", *flags, 8, "--out", work / f"whole-{count}"], log)
    one = last_checkpoint(work / "whole-1")
    for first, then in ((2, 2), (4, 4), (2, 1), (2, 4)):
        out = work / f"{first}-then-{then}"
        finish([*ranks(first), "train.py", *flags, 4, "--out", out], log)
        finish([*ranks(then), "train.py", *flags, 8, "--out", out], log)
        both = last_checkpoint(out)
        assert same_to_rounding(one, both)
        print("ranks: {} to step 4, {} to step 8, against one process: averaged gradient {:.1e}, weights {:.1e} apart "
              "(relative)".format(first, then, *apart(one, both)), flush=True)
    for count in (1, 4):
        seen, out, script = work / f"seen-{count}", work / f"resumed-{count}", work / f"watch-{count}.py"
        seen.mkdir()
        script.write_text(WATCHED.format(here=str(HERE), folder=str(seen)))
        finish([*ranks(2), script, *flags, 30, "--out", out], log)
        finish([*ranks(count), script, *flags, 72, "--out", out], log)
        lines = [line.split() for file in seen.iterdir() for line in file.read_text().splitlines()]
        reports = 16 * (2 + count)          # each process reads pictures 0 to 15 once for its reports
        numbers = sorted(int(n) for n, _ in lines)
        for n in range(16):
            for _ in range(2 + count):
                numbers.remove(n)
        assert numbers == list(range(72 * 4)), "a picture twice, or skipped"
        files = {n: name for n, name in lines}
        for epoch in range(3):
            names = [files[str(n)] for n in range(96 * epoch, 96 * epoch + 96)]
            assert len(set(names)) == 96
        print(f"ranks: 2 ranks to step 30, {count} from there to 72: "
              f"{len(lines) - reports} pictures given, in 3 epochs each of 96 files exactly once")


def in_node(i, command, log):
    """A command in network namespace i, which believes to be a machine of its own."""
    words = " ".join(str(word) for word in command)
    return subprocess.Popen(["ip", "netns", "exec", f"soak{i}", "unshare", "--uts", "sh", "-c",
                             f"hostname node{i}; exec {words}"], cwd=HERE, env=ENV | dict(NODE=str(i)), stdout=open(log, "ab"),
                            stderr=subprocess.STDOUT, start_new_session=True)


def nodes(work):
    """Two network namespaces joined by a cable, which is then cut."""
    run = lambda line: subprocess.run(line.split(), check=True)
    for i in (0, 1):
        run(f"ip netns add soak{i}")
        folder = Path(f"/etc/netns/soak{i}")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
    try:
        run("ip link add cable0 type veth peer name cable1")
        for i in (0, 1):
            run(f"ip link set cable{i} netns soak{i}")
            run(f"ip -n soak{i} addr add 10.77.0.{i + 1}/24 dev cable{i}")
            for device in ("lo", f"cable{i}"):
                run(f"ip -n soak{i} link set {device} up")
        rendezvous = {"c10d": ["--rdzv-backend=c10d", "--rdzv-endpoint=10.77.0.1:29500"],
                      "static": ["--master-addr=10.77.0.1"]}

        def both(kind, flags, name, *more):
            return [in_node(i, [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *rendezvous[kind], *more,
                                *([f"--node-rank={i}"] * (kind == "static")), "train.py", *flags],
                            work / f"{name}-{i}") for i in (0, 1)]
        flags = [*TRAIN, *EXACT, "--save-every", "40", "--timeout", "0.5", "--steps"]
        finish([sys.executable, "train.py", *flags, "8", "--out", work / "one"], work / "log")
        finish([*ranks(2), "train.py", *flags, "8", "--out", work / "two-ranks"], work / "log")
        one = last_checkpoint(work / "one")
        for kind in rendezvous:
            for process in both(kind, [*flags, "8", "--out", work / kind], kind):
                assert process.wait(300) == 0
            two = last_checkpoint(work / kind)
            assert same_to_rounding(one, two)
            assert_same_run(work / kind, work / "two-ranks")
            print("nodes: 2 nodes x 1 rank ({} rendezvous) after 8 steps: the bits of 2 ranks on a node; against one "
                  "process averaged gradient {:.1e}, weights {:.1e} apart".format(kind, *apart(one, two)), flush=True)
        flags.append("200")
        finish([*ranks(2), "train.py", *flags, "--out", work / "unbroken"], work / "log")

        out, name = work / "cut", "cut"
        pair = both("static", [*flags, "--out", out], name)
        wait_for(lambda: list(out.glob("ckpt-*40.pt")))
        run("ip -n soak1 link set cable1 down")
        cut, took = time.time(), []
        for process in pair:
            assert process.wait(120) != 0
            took.append(time.time() - cut)
        said = [re.search(r"rank \d on node\d: no word.*checkpoint", (work / f"{name}-{i}").read_text())[0]
                for i in (0, 1)]
        assert max(took) < 30 + 5 and "rank 1 on node1;" in said[0] and "rank 0 on node0;" in said[1]
        assert not processes(out)
        run("ip -n soak1 link set cable1 up")
        for process in both("static", [*flags, "--out", out], name):
            assert process.wait(300) == 0
        assert_same_run(work / "unbroken", out)
        print(f"nodes: cut off at --timeout 0.5 (30 s): both end after {took[0]:.1f} and {took[1]:.1f} s, "
              f"saying '{said[0]}' and '{said[1]}'; joined again, both resume to the unbroken run's bits", flush=True)

        out = work / "healed"
        # Ranks come back apart in time: on a busy machine 0.5 minutes are too few to meet in.
        pair = both("static", [*flags, "--timeout", "2", "--out", out], "healed", "--max-restarts=3")
        wait_for(lambda: list(out.glob("ckpt-*40.pt")))
        time.sleep(1)
        kill(next(pid for pid in processes(out) if "NODE=1" in Path(f"/proc/{pid}/environ").read_text()
                  and "RANK=1" in Path(f"/proc/{pid}/environ").read_text().split("\0")))
        for process in pair:
            assert process.wait(300) == 0
        assert_same_run(work / "unbroken", out)
        print("nodes: rank 1 killed on its node, --max-restarts=3: healed by themselves, to the same bits")
    finally:
        for i in (0, 1):
            subprocess.run(["ip", "netns", "del", f"soak{i}"])
            shutil.rmtree(f"/etc/netns/soak{i}", ignore_errors=True)


def png(width, height, colour=0, depth=1):
    """A PNG of one colour that is small as a file, whatever its size as a picture."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    row, packer = b"\0" + bytes([colour]) * ((width * depth + 7) // 8), zlib.compressobj(9)
    rows = b"".join([packer.compress(row) for _ in range(height)] + [packer.flush()])
    kind = 0
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)) \
        + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def seeds_of_pictures(rng):
    """{file name: its bytes}, sound pictures of every format and mode that the loader is to read."""
    found = {}
    rgb = Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    deep = rng.integers(0, 65536, (40, 44), dtype=np.uint16)
    frames = [Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(3)]
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, image, more in [
            ("rgb.png", rgb, {}), ("rgb.jpg", rgb, dict(quality=80)), ("turned.jpg", rgb, dict(exif=exif)),
            ("progressive.jpg", rgb, dict(progressive=True)), ("cmyk.jpg", rgb.convert("CMYK"), {}),
            ("lossy.webp", rgb, {}), ("lossless.webp", rgb, dict(lossless=True)), ("rgb.bmp", rgb, {}),
            ("rgb.gif", rgb, {}), ("rgb.tif", rgb, {}), ("lzw.tif", rgb, dict(compression="tiff_lzw")),
            ("jpeg.tiff", rgb, dict(compression="jpeg")), ("deflate.tif", rgb, dict(compression="tiff_deflate")),
            ("alpha.png", rgb.convert("RGBA"), {}), ("grey.png", rgb.convert("L"), {}),
            ("grey-alpha.png", rgb.convert("LA"), {}), ("bits.png", rgb.convert("1"), {}),
            ("palette.png", rgb.convert("P"), dict(transparency=3)), ("deep.png", Image.fromarray(deep), {}),
            ("deep.tif", Image.fromarray(deep), {}), ("whole.tif", Image.fromarray(deep.astype(np.int32)), {}),
            ("float.tif", Image.fromarray(rng.random((40, 44), dtype=np.float32)), {}),
            ("lab.tif", rgb.convert("LAB"), {}),
            ("animated.gif", frames[0], dict(save_all=True, append_images=frames[1:])),
            ("animated.png", frames[0], dict(save_all=True, append_images=frames[1:])),
            ("animated.webp", frames[0], dict(save_all=True, append_images=frames[1:])),
            ("pages.tif", frames[0], dict(save_all=True, append_images=frames[1:]))]:
        file = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name.split(".")[1], name.split(".")[1].upper())
        image.save(file, kind, **more)
        found[name] = file.getvalue()
    return found


def write_mutants(folder, count, rng):
    """`count` damaged files, and the special cases once each -> names that must turn out broken."""
    sound = seeds_of_pictures(rng)
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
    special = folder / "special"
    special.mkdir()
    (special / "empty.png").touch()
    (special / "folder.png").mkdir()
    Image.new("RGB", (20, 20)).save(special / "folder.png" / "inside.png")
    (special / "loop.png").symlink_to("loop.png")
    (special / "dangling.jpg").symlink_to("nowhere")
    (special / "circle").symlink_to(folder)
    os.mkfifo(special / "pipe.png")
    with open(special / "sparse.webp", "wb") as file:   # 20 GB on paper
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(20 << 30)
    (special / "bomb-30000x30000.png").write_bytes(png(30_000, 30_000))
    (special / "bomb-12000x12000.png").write_bytes(png(12_000, 12_000))
    (special / "thin-1x60000.png").write_bytes(png(1, 60_000, depth=8))
    (special / "thin-1x4000000.png").write_bytes(png(1, 4_000_000, depth=8))
    (special / "largest-8192x8192-grey.png").write_bytes(png(8192, 8192, depth=8))
    Image.new("RGBA", (8192, 8192), (9, 9, 9, 9)).save(special / "largest-8192x8192-alpha.png", compress_level=1)
    Image.fromarray(np.full((8192, 8192), 777, np.uint16)).save(special / "largest-8192x8192-deep.png", compress_level=1)
    Image.fromarray(np.full((8192, 8192), .5, np.float32)).save(special / "largest-8192x8192-float.tif")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(special / "nan.tif")
    (special / "forbidden.png").write_bytes(sound["rgb.png"])
    os.chmod(special / "forbidden.png", 0)
    (special / "shut").mkdir()
    (special / "shut" / "in.png").write_bytes(sound["rgb.png"])
    os.chmod(special / "shut", 0)
    (special / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("größe.PNG", "花.png", "a\nb.png", "\x1b[31mred.png", "\u202egnp.png", "'; rm -rf .png", " .png"):
        (special / name).write_bytes(sound["rgb.png"])
        (special / ("bad" + name)).write_bytes(b"no picture")
    with open(os.fsencode(special) + b"/latin-\xe9.png", "wb") as file:
        file.write(b"no picture")


def pictures(work, count=12_000):
    """Damaged files by the thousand, read, then trained on."""
    rng, folder = np.random.default_rng(0), work / "pictures"
    folder.mkdir()
    write_mutants(folder, count, rng)
    reader = f"""
import os, resource, sys, time
sys.path.insert(0, {str(HERE)!r})
sys.stdout.reconfigure(errors="backslashreplace")
import data
data.CACHE_BYTES = 0
dataset = data.Pictures({str(folder)!r}, 64)
slowest = (0, "")
for i, name in enumerate(dataset.names):
    begin = time.time()
    dataset.picture(i)
    slowest = max(slowest, (time.time() - begin, data.printable(name)))
for name in sorted(dataset.broken):
    if "special" in name:
        print("   ", name, "|", dataset.broken[name])
kinds = {{}}
for why in dataset.broken.values():
    kinds[why.split(":")[0]] = kinds.get(why.split(":")[0], 0) + 1
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(f"pictures: {{len(dataset.names)}} files, {{len(dataset.broken)}} broken: {{kinds}}")
print(f"pictures: peak memory {{after / 1024:.0f}} MB; slowest {{slowest[0]:.2f}} s, for {{slowest[1]}}")
"""
    # Root may read everything, but not without its capabilities.
    as_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    done = subprocess.run([*as_user, sys.executable, "-c", reader], env=ENV, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
    print(done.stdout, end="")

    # As many sound ones, so that the run does not stop, and all of them met by two ranks with loaders.
    for file in sorted(folder.glob("[0-9]*"))[count // 4:]:
        file.unlink()
    count //= 4
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / f"sound-{i:05d}.png")
    total = 2 * count // 32 + 20
    command = [*as_user, *ranks(2), "train.py", *TRAIN, "--batch", "32", "--workers", "1", "--steps", total, "--data", folder]
    finish([*command, "--out", work / "run"], work / "log")
    named = re.findall(r"skipped (.*?): ", (work / "log").read_text())
    lines = (work / "run" / "broken.txt").read_text().splitlines()
    assert len(named) == len(set(named)) == len(lines) and "Traceback" not in (work / "log").read_text()
    print(f"pictures: training on them and as many sound ones, one epoch, 2 ranks with a loader each: "
          f"{len(named)} named, each once; '{(work / 'log').read_text().strip().splitlines()[-2][:90]}'")
    for file in folder.glob("sound-*"):
        file.unlink()
    for file in sorted(folder.glob("*[a-z].*"))[:count // 4]:
        file.write_bytes(b"no picture")
    done = subprocess.run([str(word) for word in [*command, "--out", work / "half"]], cwd=HERE, env=ENV,
                          capture_output=True, text=True, timeout=1200)
    line = [line for line in done.stderr.splitlines() if "more than half" in line]
    assert done.returncode == 1 and len(line) == 1 and not list((work / "half").glob("*.pt"))
    print("pictures:", line[0].replace(str(work), "...")[:150])
    os.chmod(folder / "special" / "shut", 0o700)

    # Zips: ../ names, a damaged directory, and zips damaged at random.
    archive = io.BytesIO()
    sound = seeds_of_pictures(rng)
    with zipfile.ZipFile(archive, "w") as file:
        for i, (name, raw) in enumerate(sound.items()):
            file.writestr(["../", "/", "../../etc/", "a/./", "a\\", "C:/"][i % 6] + name, raw)
    raw, refused, broken, fine = archive.getvalue(), 0, 0, 0
    import data
    for i in range(1000):
        bad = bytearray(raw)
        for _ in range(0 if i == 0 else rng.integers(1, 20)):
            bad[-1 - rng.integers(2500) if i % 2 else rng.integers(len(bad))] ^= 1 << rng.integers(8)
        path = work / f"{i}.zip"
        path.write_bytes(bad)
        try:
            dataset = data.Pictures(path, 16)
            for n in range(len(dataset.names)):
                dataset[n]
            broken, fine = broken + bool(dataset.broken), fine + (not dataset.broken)
        except ValueError as error:
            assert str(error).startswith("--data") and "\n" not in str(error)
            refused += 1
        path.unlink()
    print(f"pictures: 1000 zips with ../ and absolute names, 999 of them damaged: {refused} refused in one line, "
          f"{broken} read but for broken pictures, {fine} read whole")


def time_(work, steps=3000):
    """Memory and open files over 3,000 steps with saves, grids and loaders."""
    out, rows = work / "run", {}
    process = start([sys.executable, "train.py", *TRAIN, "--steps", steps, "--save-every", "50", "--sample-every",
                     "300", "--workers", "1", "--out", out], work / "log")
    while process.poll() is None:
        try:
            step = log_lines(out)[-1]["step"] // 100 * 100
            children = [int(pid) for task in Path(f"/proc/{process.pid}/task").iterdir()
                        for pid in (task / "children").read_text().split()]
            memory = [int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
                      for pid in (process.pid, *children)]
            rows.setdefault(step, (memory[0], sum(memory[1:]), len(os.listdir(f"/proc/{process.pid}/fd"))))
        except (OSError, IndexError, TypeError):
            pass
        time.sleep(.2)
    assert process.returncode == 0
    for step in (100, 300, 600, 1000, 1500, 2000, 2500, 2900):
        print(f"time: step {step}: {rows[step][0]:.0f} MB, loader {rows[step][1]:.0f} MB, {rows[step][2]} open files")
    late = [row for step, row in rows.items() if step >= 300]
    assert max(row[0] for row in late) < 1.05 * rows[300][0] + 20 and max(row[2] for row in late) <= rows[300][2] + 8
    wait_for(lambda: not processes(out), 15)
    assert not list(out.glob("*.part"))


def samples(work):
    """1,000 pictures, killed some of the way three times; two ranks take turns with one."""
    finish([sys.executable, "train.py", *TRAIN, "--steps", "20", "--out", work / "run"], work / "log")
    flags = ["sample.py", "--ckpt", work / "run/model.pt", "--n", "1000", "--steps", "8", "--guidance", "2"]
    finish([sys.executable, *flags, "--out", work / "unbroken"], work / "log")
    met = []
    for launcher, until in (([sys.executable], 250), ([*ranks(2), "--"], 500), ([sys.executable], 800)):
        process = start([*launcher, *flags, "--out", work / "killed"], work / "log")
        wait_for(lambda: len(list((work / "killed").glob("0*.png"))) >= until)
        os.killpg(process.pid, signal.SIGKILL)
        for pid in processes(work / "killed"):
            kill(pid)
        process.wait()
        time.sleep(.5)
        met.append({file.name: file.stat().st_mtime_ns for file in (work / "killed").glob("0*.png")})
    finish([sys.executable, *flags, "--out", work / "killed"], work / "log")
    arrays = [np.load(work / name / "samples.npz")["arr_0"] for name in ("unbroken", "killed")]
    assert np.array_equal(*arrays) and arrays[0].shape[0] == 1000
    for name in met[-1]:
        assert (work / "unbroken" / name).read_bytes() == (work / "killed" / name).read_bytes()
    kept = sum((work / "killed" / name).stat().st_mtime_ns == when for name, when in met[-1].items())
    assert {file.name for file in (work / "killed").iterdir()} == {file.name for file in (work / "unbroken").iterdir()}
    print(f"samples: killed at {[len(seen) for seen in met]} of 1,000 pictures; {kept} of the last {len(met[-1])} were "
          "not drawn again; all 1,000 equal those of the unbroken run, and no other file is there")


EXPERIMENTS = dict(kills=kills, restarts=restarts, signals=signals, disk=disk, ranks=ranks_, nodes=nodes,
                   pictures=pictures, time=time_, samples=samples)

if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in sys.argv[1:] or EXPERIMENTS:
        if name not in EXPERIMENTS:
            sys.exit(f"{name}: must be one of {', '.join(EXPERIMENTS)}")
        begin = time.time()
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            try:
                EXPERIMENTS[name](Path(folder))
            finally:
                for pid in processes(folder):
                    kill(pid)
        print(f"{name}: held, {time.time() - begin:.0f} s", flush=True)
