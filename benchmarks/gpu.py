"""What one GPU does, in at most 13 minutes: the most wanted parts first, to be cut off anywhere.

    python benchmarks/gpu.py                      every part, into gpu.md as well
    python benchmarks/gpu.py --minutes 5 base noise

A part is a process of its own: what it used up is free again, and it ends when the time is up.
What it has said by then is in gpu.md. Without CUDA all sizes are those of a toy: that shows that
the parts work, and nothing about speed.
"""
import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import speed
from config import parse_config
from data import collate
from memory import parts_that_fit
from noise import TRAINING, draw_noise, seed_of
from speed import (CUDA, DEVICE, HERE, build, flops, in_turn, ours, product, ratio, say,
                   training_step)
from train import loss_function
from uvit import PRESETS

RES, LARGE, MIDDLE = (512, "base", ("mini", "small")) if CUDA else (64, "laptop", ("tiny",))
BATCH, ROUNDS = (16, 10) if CUDA else (2, 1)


def network(name, res):
    return lambda: ours(res, PRESETS[name]["network"])


def speed_of(name, make, res, batch, how="compiled", step=None):
    """A line of a table: pictures/s, MFU, peak memory of a training step."""
    torch._dynamo.reset()
    (work, weights), (matmul, cost) = flops(make, res), product(8192 if CUDA else 512)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    model = build(name, how if CUDA else "eager", make)
    times = in_turn(ROUNDS, step=(step or training_step)(model, res, batch), product=matmul)
    mfu = ratio([batch * work / s for s in times["step"]], [cost / s for s in times["product"]])
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0
    say(f"| {name} | {weights / 1e6:.1f} | {batch} | {work / 1e9:.1f} | "
        f"{batch / median(times['step']):.1f} | {mfu} | {peak:.1f} |")


HEADER = "| | M weights | batch | GFLOP a picture | pictures/s | MFU | GiB |\n|-|-|-|-|-|-|-|"


# ---------------------------------------------------------------------------- the parts

def base():
    say(f"### `{LARGE}` at {RES}: a training step, bf16, compiled\n\n{HEADER}")
    speed_of(f"ours, `{LARGE}`", network(LARGE, RES), RES, BATCH)
    config = parse_config(["--res", str(RES), "--model", LARGE])
    config.bf16 = config.compile = CUDA
    parts, why = parts_that_fit(config, 1000, 1, DEVICE, loss_function(config))
    say(f"\nA batch of {config.batch} on this one device: {parts} parts ({why}).")


def command():
    """`torchrun train.py --res 512`, word for word, but for where it ends and where it goes."""
    steps = 12 if CUDA else 1
    small = [] if CUDA else ["--batch", "2", "--model", "tiny"]
    say(f"### `torchrun train.py --res {RES}`\n\n```")
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "train.py", "--res",
             str(RES), "--steps", str(steps), "--log-every", "4", "--sample-every", "0", "--out",
             f"{out}/run", *small], cwd=HERE, capture_output=True, text=True)
        said = [line for line in done.stdout.splitlines() if line.strip()]
        say("\n".join(said) + f"\n```\nExit code {done.returncode}. " + done.stderr[-300:]
            * bool(done.returncode) + "Lines of its log:\n\n```")
        with contextlib.suppress(OSError):
            say(Path(out, "run/log.jsonl").read_text().rstrip())
    say("```")


def noise():
    """t, eps and u of a batch: in one go, against a generator set anew for each picture."""
    def one_by_one(seed, numbers, res, device):
        generator, t, eps, u = torch.Generator(device), [], [], []
        for n in numbers:
            generator.manual_seed(seed_of(TRAINING, seed, n))
            t.append(torch.rand((), generator=generator, device=device))
            u.append(torch.rand((), generator=generator, device=device))
            eps.append(torch.randn(3, res, res, generator=generator, device=device))
        return torch.stack(t), torch.stack(eps), torch.stack(u)

    say("### Noise of a batch\n\n| | host, ms | in all, ms | one by one over it |\n|-|-|-|-|")
    for batch, res in ((256, 64), (256, 128), (32, 512)) if CUDA else ((4, 64),):
        host = {"one by one": [], "at once": []}

        def call(name, draw):
            start = time.perf_counter()
            draw(0, range(batch), res, DEVICE)
            host[name].append(time.perf_counter() - start)      # without waiting for the GPU
        times = in_turn(ROUNDS, **{"one by one": partial(call, "one by one", one_by_one),
                                   "at once": partial(call, "at once", draw_noise)})
        for name, seconds in times.items():
            say(f"| {batch} of {res} x {res}, {name} | {1e3 * median(host[name][2:]):.2f} | "
                f"{1e3 * median(seconds):.2f} | {ratio(times['one by one'], seconds)} |")
    here, there = (draw_noise(3, range(8), 64, device)[1].cpu() for device in ("cpu", DEVICE))
    say(f"\nLargest difference from the CPU's noise: {(here - there).abs().max():.1e}.")


def middle():
    say(f"### {', '.join(f'`{name}`' for name in MIDDLE)}: a training step, bf16\n\n{HEADER}")
    for name, res, batch in zip(MIDDLE, (128, 256) if CUDA else (64,), (128, 64) if CUDA else (2,)):
        for how in ("eager", "compiled"):
            speed_of(f"`{name}` at {res}, {how}", network(name, res), res, batch, how)
        if CUDA:
            speed_of(f"`{name}` at {res}, CUDA graphs", network(name, res), res, batch, "eager",
                     step=step_with_graphs)


def step_with_graphs(model, res, batch):
    """speed.training_step, whose forward and backward pass run as CUDA graphs."""
    model.compile(mode="reduce-overhead", dynamic=False)
    step = training_step(model, res, batch)

    def marked():
        torch.compiler.cudagraph_mark_step_begin()
        step()
    return marked


def rival():
    say(f"### denoising-diffusion-pytorch's U-ViT at {RES}\n\n{HEADER}")
    shape = dict(dim=88, dim_mults=(1, 2, 12), patch_size=4, vit_depth=22, attn_dim_head=64,
                 attn_heads=14) if CUDA else dict(dim=16, dim_mults=(1, 2), vit_depth=1)
    try:
        make = partial(speed.ddp_uvit, **shape)
        with torch.device("meta"):
            make()
    except Exception as error:
        return say(f"(left out: {type(error).__name__}: {str(error).splitlines()[0][:90]})")
    speed_of("denoising-diffusion-pytorch", make, RES, BATCH)


def sampler():
    say(f"### The sampler: `{LARGE}` at {RES}\n")
    if CUDA:
        return speed.graphs(build("ours", "compiled", network(LARGE, RES)).eval())
    model = build("ours", "eager", network(LARGE, RES)).eval()
    noise_of, schedule = speed.picture_noise(0, range(2), RES, DEVICE), \
        speed.logsnr_schedule("shifted", RES)
    times = in_turn(1, sample=lambda: speed.sample(model, schedule, noise_of, 2))
    say(f"2 steps: {2 / median(times['sample']):.2f} pictures/s")


def memory():
    """A batch that does not fit at first: train.py tries, and takes more parts."""
    say("### Out of memory, for real\n\n```")
    script = "import torch, run, train\n" \
        "if torch.cuda.is_available():\n" \
        "    torch.cuda.set_per_process_memory_fraction(20e9 / torch.cuda.mem_get_info()[1])\n" \
        "run.run_command(train.main)\n"
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run(
            [sys.executable, "-c", script, "--res", str(RES), "--model", LARGE, "--batch",
             "256" if CUDA else "2", "--steps", "1", "--sample-every", "0", "--out", f"{out}/run"],
            cwd=HERE, capture_output=True, text=True)
    say("\n".join(line for line in done.stdout.splitlines() if line.strip())
        + f"\n```\nExit code {done.returncode}. " + done.stderr[-300:] * bool(done.returncode))


def paper():
    say("### `paper` at 512 with `--recompute`\n")
    if not CUDA:
        return say("(needs CUDA)")
    speed.paper(*product())


def dial():
    speed.resolution(3) if CUDA else say("(needs CUDA: `python benchmarks/speed.py dial`)")


def wavelet():
    speed.wavelet(5) if CUDA else say("(needs CUDA: `python benchmarks/speed.py wavelet`)")


def load():
    """Pictures/s of all loaders together, which a training step has to wait for or not."""
    say("### Loading: drawn flowers\n\n| size | loaders | pictures/s |\n|-|-|-|")
    for res in (128, 512) if CUDA else (64,):
        workers, count = (min(8, os.cpu_count()), 512) if CUDA else (1, 8)
        loader = iter(torch.utils.data.DataLoader(
            speed.Flowers(res), batch_sampler=(range(n, n + 8) for n in range(0, 2 * count, 8)),
            num_workers=workers, collate_fn=collate))
        for _ in range(count // 8):             # until all of them are at work
            next(loader)
        start = time.perf_counter()
        for _ in range(count // 8):
            next(loader)
        say(f"| {res} | {workers} | {count / (time.perf_counter() - start):.0f} |")


PARTS = dict(base=base, command=command, noise=noise, middle=middle, memory=memory, sampler=sampler,
             rival=rival, paper=paper, load=load, wavelet=wavelet, dial=dial)


# ---------------------------------------------------------------------------- one after another

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--minutes", type=float, default=13, help="for all parts (default: 13)")
    parser.add_argument("--out", default="gpu.md", help="the tables (default: gpu.md)")
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"{' '.join(unknown)}: parts are {', '.join(PARTS)}")
    end = time.time() + 60 * args.minutes
    name = torch.cuda.get_device_name() if CUDA else "a CPU, sizes of a toy"
    with open(args.out, "a", encoding="utf-8") as file:
        def tell(text):
            for where in (file, sys.stdout):
                where.write(text)
                where.flush()
        tell(f"# torch {torch.__version__}, {name}\n")
        for part in args.parts or PARTS:
            left = end - time.time()
            if left < 1:
                tell(f"\n(no time for {part})\n")
                continue
            start = time.time()
            process = subprocess.Popen([sys.executable, __file__, "--part", part],
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                       start_new_session=True)
            timer = threading.Timer(left, os.killpg, (process.pid, signal.SIGKILL))
            timer.start()
            tell("\n")
            for line in process.stdout:         # as they come: this run, too, may be cut off
                tell(line)
            timer.cancel()
            code = process.wait()
            tell(f"\n({part}: {time.time() - start:.0f} s{f', exit code {code}' * bool(code)})\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--part"]:
        PARTS[sys.argv[2]]()
    else:
        main()
