"""The trainer: torch.compile, bf16, one process or many, resumed by the command that started it.

    python train.py                              flowers at 64 x 64, on whatever machine this is
    torchrun --nproc_per_node=8 train.py --res 512 --data PATH

Picture n of the run (n = step * batch + its place in the batch), its crop, its t and its noise are
functions of (seed, n). So ranks, accumulation and kills do not change what is learned: N ranks sum
the same gradient as one (but for the masks of dropout), and a resumed run is the unbroken run.
"""
import argparse
import copy
import dataclasses
import inspect
import json
import os
import re
import time
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Flowers, Pictures
from loss import diffusion_loss
from sample import (DROPOUT, TRAINING, fail, grid, pick_device, picture_noise, sample, seed_of,
                    to_uint8)
from schedule import logsnr_schedule
from uvit import PRESETS, UViT, wavelet_levels, unet_levels


@dataclass
class Config:
    # Pictures
    data: str = ""              # folder or .zip of pictures; empty: the built-in flowers
    res: int = 64               # side of the pictures in pixels; picks what is marked (res) below
    flip: bool = True           # mirror half of the pictures
    # Network (uvit.py)
    model: str = ""             # tiny, small, base, paper; empty (res): tiny to 64, base above
    patch: str = "dwt"          # dwt, conv or none: how a large picture becomes a 128 x 128 map
    dropout: float = -1         # of the transformer; -1: the model's own
    dropout_res: int = 16       # also in convolutions on maps of at most this side
    # Schedule and loss (schedule.py, loss.py)
    schedule: str = "shifted"   # cosine, shifted or interpolated
    noise_d: int = 32           # size at which the picture would have the cosine schedule's noise
    loss: str = "eps"           # eps (the paper's text) or v (its settings list)
    multiscale: str = ""        # on or off; empty (res): on at 512 and above
    drop_label: float = 0.1     # share of the pictures that train the null class, for guidance
    # Optimiser
    batch: int = 0              # pictures a step, over all ranks; 0: the model's own
    accum: int = 1              # parts a rank does its share of the batch in, one after the other
    steps: int = 0              # optimiser steps of the whole run; 0: the model's own
    lr: float = 0               # learning rate after the warm-up; 0: the model's own
    warmup: int = 0             # steps of linear warm-up; 0: the model's own
    clip: float = 1.0           # largest norm of the gradient
    ema: float = 0.9999         # decay of the weights' moving average, reached by a warm-up
    seed: int = 0               # of weights, pictures, crops, noise and dropout
    # Machine
    out: str = ""               # folder of the run; empty: runs/DATA-RES-MODEL
    compile: str = ""           # on or off; empty: on with CUDA
    bf16: str = ""              # on or off; empty: on where the hardware has it
    workers: int = -1           # processes that load pictures; -1: up to 8 with CUDA, else none
    # Reports
    log_every: int = 20         # steps between lines of log.jsonl
    sample_every: int = 250     # steps between grids and losses by noise level; 0: none
    save_every: int = 250       # steps between checkpoints


DEFAULTS = {    # `paper` is the paper's; the others are ours, for smaller machines
    "tiny":  dict(batch=32,   steps=1_500,   lr=2e-3, warmup=100),
    "small": dict(batch=64,   steps=50_000,  lr=4e-4, warmup=1_000),
    "base":  dict(batch=256,  steps=300_000, lr=2e-4, warmup=5_000),
    "paper": dict(batch=2048, steps=500_000, lr=1e-4, warmup=10_000),
}
MAY_CHANGE = {"data", "steps", "accum", "out", "compile", "bf16", "workers", "log_every",
              "sample_every", "save_every"}     # on resume; all else is refused
AT_LEAST = dict(batch=0, accum=1, steps=0, lr=0, warmup=0, clip=0, ema=0, seed=0, noise_d=1,
                drop_label=0, log_every=1, sample_every=0, save_every=1, dropout_res=0)
NOISE_LEVELS = 8                # times at which the loss by noise level is measured
REPORT_STEPS = 50               # network calls for a picture of the grid
EXPECT = """What to expect of flowers at 64 x 64: a loss of 0.25 at the start, 0.05 at step 250 (the
grid shows coloured blobs), 0.03 at step 1,500 (flowers with petals, still soft at the edges).
The 1,500 steps took 16 minutes on two CPU cores."""


def parse_config(argv=None):
    """argv -> Config, with all that --res and --model pick. Wrong input: a line, exit code 2."""
    parser = argparse.ArgumentParser(description="Train a U-ViT by simple diffusion.")
    says = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        kind = dict(type=field.type)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind,
                            help=f"{says[field.name]} (default: {field.default!r})")
    config = Config(**vars(parser.parse_args(argv)))

    config.model = config.model or ("tiny" if config.res <= 64 else "base")
    switch = ("", "on", "off")
    for name, values in dict(model=PRESETS, patch=("dwt", "conv", "none"), loss=("eps", "v"),
                             schedule=("cosine", "shifted", "interpolated"),
                             multiscale=switch, compile=switch, bf16=switch).items():
        if getattr(config, name) not in values:
            wanted = ", ".join(filter(None, values))
            fail(f"--{name} {getattr(config, name)}: must be one of {wanted}")
    for name, least in AT_LEAST.items():
        if getattr(config, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    for name in ("ema", "drop_label", "dropout"):
        if getattr(config, name) >= 1:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be below 1")
    step = 2 ** (wavelet_levels(max(config.res, 1)) + unet_levels(max(config.res, 1)))
    if config.res < 16 or config.res % step:
        near = max(16, round(config.res / step) * step)
        fail(f"--res {config.res}: must be at least 16 and, at this size, a multiple of {step}, "
             f"for example {near}")
    for name, value in DEFAULTS[config.model].items():
        setattr(config, name, getattr(config, name) or value)
    config.multiscale = config.multiscale or ("on" if config.res >= 512 else "off")
    name = Path(config.data).resolve().stem if config.data else "flowers"
    config.out = config.out or f"runs/{name}-{config.res}-{config.model}"
    return config


def draw_noise(seed, first, count, res, device):
    """t (B,) ~ U(0, 1), eps (B, 3, res, res) ~ N(0, 1), u (B,) ~ U(0, 1) of pictures first to
    first + count - 1. Each has its own generator: the same noise on any rank and in any batch.
    """
    generator, t, eps, u = torch.Generator(device), [], [], []
    for n in range(first, first + count):
        generator.manual_seed(seed_of(TRAINING, seed, n))
        t.append(torch.rand((), generator=generator, device=device))
        u.append(torch.rand((), generator=generator, device=device))
        eps.append(torch.randn(3, res, res, generator=generator, device=device))
    return torch.stack(t), torch.stack(eps), torch.stack(u)


def ema_decay(updates, ema):
    """Warm-up of the EMA: min(ema, (1 + n) / (10 + n)), n = updates - 1.

    updates: how many were made before. The first gives 0: the random start has no weight.
    """
    return min(ema, updates / (9 + updates))


def save(path, content):
    """Write, flush, rename: a reader of `path` finds the old file or the new one, never half."""
    part = Path(f"{path}.part")
    with open(part, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def collate(items):
    x, label, broken = zip(*items)
    return torch.stack(x), torch.tensor(label), sum(broken, [])


def main(argv=None):
    config = parse_config(argv)

    # -- ranks and device
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, has_bf16 = pick_device()
    ddp, cuda, master = "RANK" in os.environ, device.type == "cuda", rank == 0
    if config.batch % (world * config.accum):
        fail(f"--batch {config.batch}: must be a multiple of ranks x accum, {world * config.accum}")
    micro = config.batch // (world * config.accum)
    if ddp:
        # Half an hour, since the ranks wait while the first one saves.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=30))
    bf16 = config.bf16 == "on" if config.bf16 else has_bf16
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bf16
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    # -- pictures
    try:
        dataset = Flowers(config.res, config.seed)
        if config.data:
            dataset = Pictures(config.data, config.res, config.seed, config.flip)
        report_x, report_label, _ = collate([dataset[n] for n in range(16)])    # can any be read?
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        fail(str(error))
    pictures = len(dataset.names) if config.data else 0
    if config.data and pictures < config.batch:
        fail(f"--data {config.data}: {pictures} pictures are fewer than --batch "
             f"{config.batch}; add pictures or lower --batch")
    classes = len(dataset.classes)

    # -- model
    torch.manual_seed(config.seed)
    model = UViT.from_config(vars(config), classes).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), eps=1e-12,
                                  weight_decay=0, fused=True)
    logsnr = logsnr_schedule(config.schedule, config.res, config.noise_d)

    # -- resume
    out, start, seconds = Path(config.out), 0, 0.0
    checkpoints = sorted(out.glob("ckpt-*.pt"))
    if checkpoints:
        saved = torch.load(checkpoints[-1], map_location="cpu", weights_only=True)
        for name, was in saved["config"].items():
            if name not in MAY_CHANGE and getattr(config, name) != was:
                fail(f"{out} was started with --{name.replace('_', '-')} {was}, now "
                     f"{getattr(config, name)}: go back to that, or give a new --out")
        if (saved["classes"], saved["pictures"]) != (dataset.classes, pictures):
            fail(f"{out} was started with {saved['pictures']} pictures in {len(saved['classes'])} "
                 f"classes, now {pictures} in {classes}: put them back, or give a new --out")
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        start, seconds = saved["step"], saved["seconds"]
        del saved
    if ddp:
        starts = [None] * world
        dist.all_gather_object(starts, start)
        if len(set(starts)) > 1:
            fail(f"the ranks would start at steps {starts}: {out} must be one folder for all nodes")
    if start >= config.steps:
        if master:
            print(f"{out} is at step {start} of {config.steps}: done. "
                  f"More: --steps {2 * start}. Pictures: python sample.py")
        if ddp:
            dist.barrier()      # leave together
        return
    net = model
    if config.compile == "on" or (not config.compile and cuda):
        model.compile()
    if ddp:
        net = DDP(model, [device.index] if cuda else None, gradient_as_bucket_view=True)

    # -- what is about to happen
    if master:
        out.mkdir(parents=True, exist_ok=True)
        log_path = out / "log.jsonl"
        if log_path.exists():       # forget what was logged after the checkpoint: it happens again
            lines = [line for line in log_path.read_text().splitlines(True) if line.endswith("\n")]
            lines = [line for line in lines if json.loads(line)["step"] <= start]
            log_path.write_text("".join(lines))
        log = open(log_path, "a", buffering=1)
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        print(f"{config.model} U-ViT, {weights:.1f} M weights, {config.res} x {config.res}, "
              f"{classes} classes, batch {config.batch} on {world} x {device.type}"
              f"{' in bf16' if bf16 else ''}, steps {start} to {config.steps}.\n"
              f"Everything goes to {out}/: look at grid.png. Stop at any time: the same command "
              "resumes.", flush=True)
        if not config.data and config.model == "tiny" and config.res == 64:
            print(EXPECT, flush=True)

    # -- loader: picture numbers of this rank, step by step, from where the run stands
    def numbers():
        for step in range(start, config.steps):
            for part in range(config.accum):
                first = step * config.batch + (part * world + rank) * micro
                yield range(first, first + micro)

    workers = config.workers
    if workers < 0:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, cores) if cuda else 0
    loader = iter(DataLoader(dataset, batch_sampler=numbers(), num_workers=workers,
                             collate_fn=collate, pin_memory=cuda))

    # -- reports: a grid from fixed noise and the loss by noise level, the work shared by all ranks
    columns = min(classes, 10) or 8
    shown = columns * (4 if config.res <= 128 else 1)
    _, report_eps, _ = draw_noise(config.seed + 1, 0, 16, config.res, device)
    report_x, report_label = report_x.to(device), report_label.to(device) if classes else None

    @torch.no_grad()
    def report():
        """Loss of the EMA by noise level, and on rank 0 its pictures: the same noise each time."""
        times = (torch.arange(NOISE_LEVELS, device=device) + .5) / NOISE_LEVELS
        mine, drawn, parts = range(rank, shown, world), [], [None] * world
        label = torch.tensor([i % classes for i in mine], device=device) if classes else None
        with autocast:
            losses = [diffusion_loss(ema, report_x, t.expand(len(report_x)), report_eps, logsnr,
                                     report_label).item() for t in times]
            if mine:
                noise = picture_noise(config.seed, mine, config.res, device)
                drawn = to_uint8(sample(ema, logsnr, noise, REPORT_STEPS, label, bar=master))
        if ddp:
            dist.gather_object(drawn, parts if master else None)
        else:
            parts = [drawn]
        return losses, [parts[i % world][i // world] for i in range(shown)] if master else None

    # -- loop
    model.train()
    multiscale = config.multiscale == "on"
    bar = tqdm(total=config.steps, initial=start, disable=not master, unit="step")
    total, skipped, in_a_row, longest = (torch.zeros((), device=device) for _ in range(4))
    known_broken, clock, last = set(), time.time(), start
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / config.warmup)
        torch.manual_seed(seed_of(DROPOUT, config.seed, step, rank))

        for part in range(config.accum):
            x, label, broken = next(loader)
            for reason in set(broken) - known_broken:
                tqdm.write(f"skipped {reason}")
                known_broken.add(reason)
            first = step * config.batch + (part * world + rank) * micro
            t, eps, u = draw_noise(config.seed, first, micro, config.res, device)
            x, label = x.to(device, non_blocking=True), label.to(device, non_blocking=True)
            label = torch.where(u < config.drop_label, classes, label) if classes else None
            with net.no_sync() if ddp and part < config.accum - 1 else nullcontext():
                with autocast:
                    loss = diffusion_loss(net, x, t, eps, logsnr, label, config.loss, multiscale)
                (loss / config.accum).backward()
            total += loss.detach() / config.accum

        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        # All ranks have the same gradient, so all skip together, inside AdamW, without a wait.
        optimizer.found_inf = (~norm.isfinite()).float()
        skipped += optimizer.found_inf
        in_a_row = (in_a_row + 1) * optimizer.found_inf
        longest = torch.maximum(longest, in_a_row)
        if device.type != "mps" or not optimizer.found_inf:     # whose AdamW does not look
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()),
                                 1 - ema_decay(step, config.ema))
        bar.update()

        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            if ddp:
                dist.all_reduce(total)
            mean = total.item() / world / (done - last)     # waits for the GPU: before the clock
            took = time.time() - clock
            seconds = round(seconds + took, 1)
            images_s = round((done - last) * config.batch / took, 1)
            if longest >= 10:
                fail(f"step {done}: {int(longest)} gradients in a row were not finite; the last "
                     f"good checkpoint is in {out}, try a lower --lr")
            if master:
                bar.set_postfix(loss=f"{mean:.4f}", images_s=images_s)
                log.write(json.dumps(dict(step=done, loss=mean, norm=norm.item(), lr=group["lr"],
                                          skipped=int(skipped), images_per_second=images_s,
                                          seconds=seconds)) + "\n")
            total.zero_()
            clock, last = time.time(), done
        if config.sample_every and (done % config.sample_every == 0 or done == config.steps):
            losses, drawn = report()
            if master:
                log.write(json.dumps(dict(step=done, loss_by_noise_level=losses)) + "\n")
                tqdm.write(f"step {done}: loss from clean to noisy "
                           + " ".join(f"{loss:.4f}" for loss in losses))
                grid(drawn, columns).save(out / f"grid-{done:07d}.png")
                grid(drawn, columns).save(out / "grid.png")
        if master and (done % config.save_every == 0 or done == config.steps):
            content = dict(config=vars(config), classes=dataset.classes, step=done,
                           ema=ema.state_dict())
            save(out / "model.pt", content)     # first: a run whose last checkpoint stands is done
            save(out / f"ckpt-{done:08d}.pt", content | dict(
                pictures=pictures, seconds=seconds, model=model.state_dict(),
                optimizer=optimizer.state_dict()))
            for old in sorted(out.glob("ckpt-*.pt"))[:-2]:
                old.unlink()
    bar.close()
    if ddp:
        dist.barrier()
    if master:
        print(f"done: {out}/grid.png, {out}/model.pt. Pictures: python sample.py")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from the last checkpoint")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
