"""The trainer: torch.compile, bf16, one process or many, resumed by the command that started it.

    python train.py                              flowers at 64 x 64, on whatever machine this is
    torchrun --nproc_per_node=8 train.py --res 512 --data PATH

Picture n of the run (n = step * batch + its place in the batch), its crop, its t and its noise are
functions of (seed, n). So ranks, accumulation and kills do not change what is learned: N ranks sum
the same gradient as one (but for the masks of dropout), and a resumed run is the unbroken run.
"""
import argparse                 # for --flip and --no-flip; the rest of it is in sample.py
import copy
import dataclasses
import inspect
import json
import math
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections import ChainMap
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch._functorch.config
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import FORMAT, append, carry_over, lock, read, trim, write
from data import Flowers, Pictures, printable
from loss import diffusion_loss
from memory import BASE, RAISES, divisor, out_of_memory, parts_that_fit, recompute_blocks, rehearse
from sample import (DROPOUT, TRAINING, Parser, Steady, compiler_trouble, fail, grid, has_cuda,
                    load_model, network, number, pick_device, picture_noise, sample, seed_of,
                    to_uint8, whole)
from schedule import SCHEDULES, logsnr_schedule, side, sides
from text import tokenizer, unconditional
from uvit import PRESETS, residual_blocks, unet_levels, wavelet_levels


@dataclass
class Config:
    # Pictures
    data: str = ""              # folder or .zip of pictures; empty: the built-in flowers
    res: str = "64"             # pixels, 64 or 384x640 (H x W); picks what is marked (res) below
    portrait: bool = False      # turn pictures that stand upright, and tell the network
    flip: bool = True           # mirror half of the pictures
    # Captions (text.py)
    text: str = ""              # bytes, or t5:NAME, a T5 that transformers finds; empty: classes
    text_length: int = 128      # tokens of a caption, the rest of it is cut off
    # Network (uvit.py)
    model: str = ""             # tiny, mini, small, base, paper; empty: tiny, CUDA (res > 64): base
    net: str = "uvit"           # uvit or unet
    blocks_16: int = 0          # blocks at 16 x 16, the dial of the size; 0: the model's own
    skips: str = "block"        # of the U-ViT: one a block, or one a level (SiD2, not in the paper)
    patch: str = "dwt"          # dwt, conv or none: how a large picture becomes a 128 x 128 map
    dropout: float = -1         # at the bottom of the network; -1: the model's own
    dropout_res: int = 16       # also in convolutions on maps of at most this side
    init: str = ""              # model.pt to start from, of another size, too; empty: random
    # Schedule and loss (schedule.py, loss.py)
    schedule: str = "shifted"   # cosine, shifted or interpolated
    noise_d: int = 32           # size at which the picture would have the cosine schedule's noise
    loss: str = "eps"           # eps (the paper's text), v (its settings list) or sid2 (later)
    bias: float = None          # b of sid2; lower: noisy pictures count more; none (res): SiD2's
    multiscale: str = ""        # on or off; empty (res): on at 512 and above
    drop_label: float = 0.1     # share of the pictures that train the null class or empty caption
    # Optimiser
    batch: int = 0              # pictures a step, over all ranks; 0: the model's own
    accum: int = 0              # parts to split a rank's batch into, same gradient; 0: by memory
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
    memory_budget: float = -1   # share of activations compiled code keeps; -1: .6, 1 with dropout
    recompute: bool = False     # compute the blocks anew in the backward pass: less memory, slower
    shard: bool = False         # each rank keeps its share of weights, EMA and optimizer (FSDP2)
    workers: int = -1           # processes that load pictures; -1: up to 8 with CUDA, else none
    timeout: float = 30.0       # minutes that ranks wait for a silent one and then name it
    # Reports
    log_every: int = 20         # steps between lines of log.jsonl
    sample_every: int = 250     # steps between grids and losses by noise level; 0: none
    save_every: int = 250       # steps between checkpoints


DEFAULTS = {    # `paper` is the paper's; the others are ours, for smaller machines
    "tiny":  dict(batch=32,   steps=1_500,   lr=2e-3, warmup=100),
    "mini":  dict(batch=128,  steps=10_000,  lr=8e-4, warmup=200),
    "small": dict(batch=64,   steps=50_000,  lr=4e-4, warmup=1_000),
    "base":  dict(batch=256,  steps=300_000, lr=2e-4, warmup=5_000),
    "paper": dict(batch=2048, steps=500_000, lr=1e-4, warmup=10_000),
    "unet":  dict(batch=512,  steps=2_000_000, lr=5e-5, warmup=10_000),     # `paper` as a U-Net
}
# What another command may change when a run goes on; anything else is refused.
MAY_CHANGE = {"data", "steps", "accum", "out", "compile", "bf16", "memory_budget", "recompute",
              "shard", "workers", "timeout", "log_every", "sample_every", "save_every"}
AT_LEAST = dict(text_length=1, blocks_16=0, batch=0, accum=0, steps=0, lr=0, warmup=0, clip=1e-9,
                ema=0, seed=0, noise_d=1,
                drop_label=0, log_every=1, sample_every=0, save_every=1, dropout_res=0, dropout=-1,
                workers=-1, timeout=0.05, memory_budget=-1)
AT_MOST = dict(text_length=4096, blocks_16=1000, batch=1_000_000, steps=99_999_999,
               accum=1_000_000, noise_d=4096,
               seed=2**63 - 2, workers=1024, timeout=10_000, memory_budget=1)
PARENT = os.getppid()           # under torchrun: torchrun, while it lives
NOT_FINITE_AT_MOST = 10         # gradients in a row, then the run ends
CHECKPOINTS = "ckpt-" + 8 * "[0-9]" + ".pt"
NOISE_LEVELS = 8                # times at which the loss by noise level is measured
REPORT_STEPS = 50               # network calls for a picture of the grid
FIRST_REPORT = 50               # step of a first checkpoint and grid, however seldom they are
EXPECT = """What to expect of flowers at 64 x 64: a loss of 0.25 at the start, 0.05 at step 250 (the
grid shows coloured blobs), 0.03 at step 1,500 (flowers with petals, still ragged at the edges).
The 1,500 steps took 15.5 minutes on two CPU cores."""


def default_model(res, cuda):
    return "base" if cuda and side(res) > 64 else "tiny"


def parse_config(argv=None):
    """argv -> Config, with all that --res and --model pick. Wrong input: a line, exit code 2."""
    parser = Parser(description="Train a network by simple diffusion.", allow_abbrev=False)
    says = dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(Config), re.MULTILINE))
    for field in dataclasses.fields(Config):
        kind = dict(type={int: whole, float: number, str: str}.get(field.type))
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind,
                            help=f"{says[field.name]} (default: {field.default!r})")
    config = Config(**vars(parser.parse_args(argv)))

    if not re.fullmatch(r"0*[1-9]\d{0,3}(x0*[1-9]\d{0,3})?", config.res):
        fail(f"--res {config.res}: must be pixels, like 64 or 384x640 (height x width)")
    height, width = sides(config.res)
    config.res = height if height == width else f"{height}x{width}"
    config.model = config.model or default_model(config.res, has_cuda())
    switch = ("", "on", "off")
    for name, values in dict(model=PRESETS, patch=("dwt", "conv", "none"), net=("uvit", "unet"),
                             loss=("eps", "v", "sid2"), skips=("block", "level"),
                             schedule=SCHEDULES, multiscale=switch, compile=switch,
                             bf16=switch).items():
        if getattr(config, name) not in values:
            wanted = ", ".join(filter(None, values))
            fail(f"--{name} {getattr(config, name)}: must be one of {wanted}")
    for name, least in AT_LEAST.items():
        if getattr(config, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at least {least}")
    for name, most in AT_MOST.items():
        if getattr(config, name) > most:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be at most {most}")
    for name in ("ema", "dropout", "drop_label"):
        if getattr(config, name) >= 1 or -1 < getattr(config, name) < 0:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be from 0 to below 1")
    if -1 < config.memory_budget < 0:
        fail(f"--memory-budget {config.memory_budget}: must be from 0 to 1, or -1")
    folder = Path(config.out).parent
    if config.out and folder != Path("runs") and not os.path.isdir(folder):     # as by default
        fail(f"--out {config.out}: the folder it is to be in does not exist; make that first")
    near, fits, steps = None, [height, width], []
    while near != fits:                     # another size may need another step
        near, size = fits, "{}x{}".format(*fits)
        step = 2 ** (wavelet_levels(size) + unet_levels(size) + (config.net == "unet"))
        steps.append(step)
        fits = [min(4096 // step, max(-(-16 // step), round(pixels / step))) * step
                for pixels in near]
    if [height, width] != near:
        near = f"{near[0]}x{near[1]}" if near[0] != near[1] else near[0]
        also = f" and, at this size, multiples of {steps[0]}" if steps[0] > 1 else ""
        fail(f"--res {config.res}: sides must be from 16 to 4096{also}, for example {near}")
    if config.portrait and height >= width:
        fail(f"--portrait --res {config.res}: the size must lie, height x width, like 384x640")
    if config.net == "unet" and (config.text or config.skips == "level"):
        fail(f"--net unet: has no {'--text' if config.text else '--skips level'}; --net uvit has")
    if config.bias is not None and (config.loss != "sid2" or abs(config.bias) > 20):
        fail(f"--bias {config.bias}: must be from -20 to 20, with --loss sid2")
    if config.text and config.text != "bytes" and not config.text.startswith("t5:"):
        fail(f"--text {config.text}: must be bytes, or t5:NAME")
    row = config.net if config.model == "paper" and config.net == "unet" else config.model
    for name, value in DEFAULTS[row].items():
        setattr(config, name, getattr(config, name) or value)
    large = side(config.res) >= 512 and config.loss != "sid2"
    config.multiscale = config.multiscale or ("on" if large else "off")
    name = Path(os.path.abspath(config.data)).stem if config.data else "flowers"
    config.out = config.out or f"runs/{name}-{config.res}-{config.model}"
    return config


def draw_noise(seed, first, count, res, device):
    """t (B,) ~ U(0, 1), eps (B, 3, H, W) ~ N(0, 1), u (B,) ~ U(0, 1) of pictures first to
    first + count - 1. Each has its own generator: the same noise on any rank and in any batch.
    """
    generator, t, eps, u = torch.Generator(device), [], [], []
    for n in range(first, first + count):
        generator.manual_seed(seed_of(TRAINING, seed, n))
        t.append(torch.rand((), generator=generator, device=device))
        u.append(torch.rand((), generator=generator, device=device))
        eps.append(torch.randn(3, *sides(res), generator=generator, device=device))
    return torch.stack(t), torch.stack(eps), torch.stack(u)


def ema_decay(updates, ema):
    """Warm-up of the EMA: min(ema, (1 + n) / (10 + n)), n = updates - 1.

    updates: how many were made before. The first gives 0: the random start has no weight.
    """
    return min(ema, updates / (9 + updates))


def collate(items):
    x, label, broken = zip(*items)
    return torch.stack(x), torch.stack(label), dict(ChainMap(*broken))


def ignore_signals(_):
    """In a loader's process: Ctrl-C and SIGTERM are for the trainer, which still needs pictures."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def sharded(tensor):
    """Whether it is one of FSDP2's (--shard), a DTensor, whose import would take a second."""
    return hasattr(tensor, "full_tensor")


def shares(tensors):
    """What this rank has of them: of a sharded one (--shard) its share, else all of it."""
    return [t.to_local() if sharded(t) else t for t in tensors]


def shared_as(tensors, wholes):
    """{name: whole tensor} -> the same, those sharded whose namesakes in `tensors` are."""
    def share(name, whole):
        if not sharded(tensors.get(name)):
            return whole
        from torch.distributed.tensor import distribute_tensor
        own = tensors[name]
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements,
                                 src_data_rank=None)

    return {name: share(name, whole) for name, whole in wholes.items()}


def whole_of(tree, keep=True):
    """A tensor or a state_dict with the shares of all ranks put together, which all must call.

    Not keep: of what is sharded this rank only gives its share.
    """
    if isinstance(tree, dict):
        return {name: whole_of(part, keep) for name, part in tree.items()}
    if not sharded(tree):
        return tree
    whole = tree.full_tensor()
    return (whole.cpu() if whole.dim() else whole) if keep else None


def silent_ranks(group, seconds):
    """Ask every other rank for a word, give them `seconds` -> those that sent none."""
    gone, silent, sent, asked, end = [], [], [], {}, time.time() + seconds
    for rank in set(range(dist.get_world_size())) - {dist.get_rank()}:
        try:
            sent.append(dist.isend(torch.zeros(1), rank, group))    # kept: else it is taken back
            asked[rank] = dist.irecv(torch.zeros(1), rank, group)
        except RuntimeError:
            gone.append(rank)
    for rank, answer in asked.items():
        try:
            answer.wait(timedelta(seconds=max(.1, end - time.time())))
        except RuntimeError as error:       # closed, or no answer: maybe held up by one that closed
            (silent if "Timed out" in str(error) else gone).append(rank)
    return sorted(gone or silent)


def main(argv=None):
    """Ranks and device; the training itself is `train`."""
    config = parse_config(argv)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, has_bf16 = pick_device()
    if config.batch % (world * (config.accum or 1)):
        by_parts = f" x --accum {config.accum}" if config.accum else ""
        fail(f"--batch {config.batch}: must be a multiple of {world * (config.accum or 1)}, "
             f"{world} ranks{by_parts}")
    if config.shard and "RANK" not in os.environ:
        fail("--shard: shares the model among ranks, which torchrun starts: see the README")
    config.bf16 = config.bf16 or ("on" if has_bf16 else "off")
    config.compile = compile_here(config.compile, device)
    with room_or_a_line(config), ExitStack() as at_exit:
        if "RANK" not in os.environ:
            return train(config, 0, 1, device, None, at_exit)

        env, store, timeout = os.environ, None, timedelta(minutes=config.timeout)
        one_node = env.get("LOCAL_WORLD_SIZE") == str(world)
        if one_node and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun --max-restarts: a rank is not to find the addresses of its last life
            # (pytorch #135712). Several nodes count restarts apart: they need --node-rank.
            agent = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False)
            store = dist.PrefixStore(f"life {env['TORCHELASTIC_RESTART_COUNT']}", agent)
        # Gradients travel by NCCL or gloo. By `meet` the processes agree, whatever the GPUs are at;
        # they have eight tenths of --timeout to come, then one to answer by `ask`.
        try:
            nccl = device.type == "cuda"
            dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=rank,
                                    world_size=world, timeout=timeout if nccl else .8 * timeout)
            meet, ask = (dist.new_group(backend="gloo", timeout=.8 * timeout) for _ in range(2))
            hosts = [None] * world
            dist.all_gather_object(hosts, socket.gethostname(), meet)
        except RuntimeError as error:
            fail(f"rank {rank} on {socket.gethostname()}: the other ranks did not come: "
                 f"{str(error).splitlines()[0]}", 1, every_rank=True)
        try:
            train(config, rank, world, device, meet, at_exit)
            dist.barrier(meet)              # leave together
        except RuntimeError as error:
            if "gloo" not in str(error) and not isinstance(error, dist.DistError):
                raise
            silent = silent_ranks(ask, .1 * timeout.total_seconds())
            if not silent:
                raise
            who = ", ".join(f"rank {lost} on {hosts[lost]}" for lost in silent)
            print(f"rank {rank} on {hosts[rank]}: no word from {who}; the same command goes on "
                  f"from the last checkpoint in {config.out}", file=sys.stderr, flush=True)
            os._exit(1)                     # what is left of the group would wait for them


def compile_here(wanted, device):
    """--compile, "" by default -> "on" or "off". Fails, with a line, if "on" is not possible."""
    if wanted == "off" or not wanted and device.type != "cuda":
        return "off"
    trouble = compiler_trouble(device)
    if trouble and wanted == "on":
        fail(f"--compile on: {trouble}; --compile off does without", 1)
    if trouble and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Training is not compiled, which is slower: {trouble}.", flush=True)
    return "off" if trouble else "on"


@contextmanager
def room_or_a_line(config):
    """Out of memory in the midst of training: a line, no traceback."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fail(f"out of memory ({str(error).splitlines()[0]}): a larger --accum, more parts than the "
             "start says, takes less; the same command with it goes on from the last checkpoint in "
             f"{config.out}", 1, every_rank=True)


def open_folder(out, minutes, at_exit):
    """Lock the folder of a run, made if need be, for rank 0 of this command.

    -> log.jsonl, open; names in broken.txt; the newest checkpoint or None; names of grids; None or
    why it cannot be this run's folder. minutes: --timeout, within which the others wait.
    """
    log, named, newest, reports, trouble = None, set(), None, [], None
    try:
        out.mkdir(parents=True, exist_ok=True)
        log = lock(out / "log.jsonl", min(60, int(24 * minutes)))
        at_exit.callback(log.close)
        if not os.access(out, os.W_OK):
            raise PermissionError("read-only")
        newest = max(map(str, out.glob(CHECKPOINTS)), default=None)
        ours = (out / "log.jsonl").read_bytes()[:7] in (b"", b'{"step"')
        if not ours and not newest:
            raise PermissionError("its log.jsonl is not of a run")
        reports = [file.name for file in out.glob("grid-*.png")]
        if (out / "broken.txt").exists():
            lines = (out / "broken.txt").read_text("utf-8", "replace").splitlines()
            named = {line.split("\t")[0] for line in lines}
    except BlockingIOError:
        trouble = f"--out {out}: another process trains there; end that, or give a new --out"
    except OSError as error:
        trouble = f"--out {out}: cannot be written to ({error.strerror or error})"
    return log, named, newest, reports, trouble


def agreed_parts(config, classes, world, device, meet):
    """parts_that_fit on each rank -> the most parts that one of them needs, and its reason.

    Raises ValueError on all of them if it does not fit on one.
    """
    try:
        mine = *parts_that_fit(vars(config), classes, world, device), None
    except ValueError as error:
        mine = 0, "", str(error)
    every = [mine]
    if meet:
        every = [None] * world
        dist.all_gather_object(every, mine, meet)
    for _, _, trouble in every:
        if trouble:
            raise ValueError(trouble)
    return max(every)[:2]


def finite(tensors):
    return torch.nn.utils.get_total_norm(tensors).isfinite()


def restore(file, config, dataset, model, ema, optimizer):
    """A checkpoint into model, EMA and optimizer -> its step, seconds, skipped gradients, and how
    many pictures there were at a time.

    Fails, with a line, if it is damaged or was started with other settings or pictures.
    """
    out, pictures, classes = Path(config.out), len(dataset.names), len(dataset.classes)
    try:
        saved = read(file)
    except ValueError as error:
        older = sorted(map(str, out.glob(CHECKPOINTS)))[:-1] or ["the start"]
        fail(f"{error}; without that file the run goes on from {older[-1]}")
    for name in dict.fromkeys([*vars(config), *saved["config"]]):
        was, now = saved["config"].get(name), getattr(config, name, None)
        if name not in MAY_CHANGE and now != was:
            was, now = (value if value != "" else "''" for value in (was, now))
            fail(f"{out} was started with --{name.replace('_', '-')} {was}, now {now}: go back "
                 "to that, or give a new --out")
    try:
        if (saved["classes"], saved["pictures"]) != (dataset.classes, pictures):
            fail(f"{out} was started with {saved['pictures']} pictures in "
                 f"{len(saved['classes'])} classes, now {pictures} in {classes}: put them "
                 "back, or give a new --out")
        model.load_state_dict(shared_as(model.state_dict(), saved["model"]))
        ema.load_state_dict(shared_as(ema.state_dict(), saved["ema"]))
        step, seconds, skipped = saved["step"], float(saved["seconds"]), int(saved["skipped"])
        at_a_time = saved.get("at_a_time", config.batch)
        assert isinstance(at_a_time, int) and at_a_time > 0
        state = saved["optimizer"]["state"]     # whose shapes load_state_dict does not check
        parts = [part for parts in state.values() for part in parts.values()]
        assert finite([*saved["model"].values(), *saved["ema"].values(), *parts])
        for i, p in enumerate(model.parameters()):
            assert state[i].keys() == {"step", "exp_avg", "exp_avg_sq"}
            assert state[i]["exp_avg"].shape == state[i]["exp_avg_sq"].shape == p.shape
            assert state[i]["step"].shape == () and step > 0
            moments = {name: p for name in ("exp_avg", "exp_avg_sq")}
            state[i] |= shared_as(moments, {name: state[i][name] for name in moments})
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict(dict(state=state, param_groups=groups))
    except Exception:
        fail(f"{file}: does not hold the network its configuration describes, or not whole")
    return step, seconds, skipped, at_a_time


def compile_options(device):
    """Of torch.compile: convolutions run channels last on a GPU, too, where inductor would not if
    one of them is narrow, as the last one is; dropout is drawn by torch's kernel, since that of
    inductor may repeat its masks (pytorch #198333).
    """
    return {"force_layout_optimization": device.type == "cuda", "fallback_random": True}


def memory_budget(model, wanted):
    """Share of the activations that compiled code keeps for the backward pass: --memory-budget.

    All of them where there is dropout: else the compiler may draw its masks a second time, other
    ones, and the gradient is of nothing (pytorch #190758).
    """
    drops = any(part.p > 0 for part in model.modules() if isinstance(part, torch.nn.Dropout))
    if drops and 0 <= wanted < 1:
        fail(f"--memory-budget {wanted:g}: must be 1 where there is dropout, whose masks compiled "
             "code would draw anew; --recompute saves memory, too")
    return 1.0 if drops else 0.6 if wanted < 0 else wanted


def announce(config, model, dataset, world, kind, start, parts, why):
    """Print what is about to happen; parts: of each rank's share of the batch, and why so many."""
    height, width = sides(config.res)
    weights = sum(p.numel() for p in model.parameters()) / 1e6
    names = ", ".join(map(printable, dataset.classes[:5])) + ", ..." * (len(dataset.classes) > 5)
    said = f"{len(dataset.classes)} classes ({names})" if names else "no classes"
    if config.text:
        said = f"captions of {dataset.captioned if config.data else 'all'} pictures"
    print(f"{config.model} {config.net}, {weights:.1f} M weights, {height} x {width}, "
          f"{said}, batch {config.batch} on {world} x {kind}"
          f"{' in bf16' if config.bf16 == 'on' else ''}, steps {start} to {config.steps}.")
    defaults = [default_model(config.res, cuda) for cuda in (False, True)]
    if config.model == defaults[kind == "cuda"] and defaults[0] != defaults[1]:
        print("Default --model at this size: {} without CUDA, {} with CUDA.".format(*defaults))
    often = f"every {config.sample_every} steps, first at {min(config.sample_every, FIRST_REPORT)}"
    share = config.batch // world
    print(f"Each step: {share} pictures{' on each rank' if world > 1 else ''} in {parts} "
          f"part{'s' * (parts > 1)} of {share // parts} ({why}).\n"
          f"Everything goes to {Path(config.out)}/; its grid.png shows samples "
          f"{often if config.sample_every else 'never'}. "
          "Stop at any time: the same command resumes.", flush=True)
    usual = vars(parse_config([]))
    if not config.data and all(getattr(config, name) == usual[name]
                               for name in usual.keys() - MAY_CHANGE - {"seed"}):
        print(EXPECT, flush=True)


def train(config, rank, world, device, meet, at_exit):
    ddp, cuda, master = "RANK" in os.environ, device.type == "cuda", rank == 0
    bf16, share = config.bf16 == "on", config.batch // world
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = bf16
    autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()

    # -- pictures
    try:
        tokens = tokenizer(config.text, config.text_length) if config.text else None
        told = dict(tokens=tokens, portrait=config.portrait)
        dataset = Flowers(config.res, config.seed, **told)
        if config.data:
            dataset = Pictures(config.data, config.res, config.seed, config.flip, **told)
        parts, why = config.accum, f"--accum {config.accum}"
        if not parts:
            parts, why = agreed_parts(config, len(dataset.classes), world, device, meet)
        torch.manual_seed(config.seed)
        model = network(vars(config), len(dataset.classes))
        if config.init and not any(Path(config.out).glob(CHECKPOINTS)):     # else it is under way
            try:
                first, saved = load_model(config.init, "cpu")
                carry_over(first, model, saved["classes"] == dataset.classes)
            except ValueError as error:
                fail(f"--init {error}")
    except ValueError as error:
        fail(str(error))
    pictures, broken = len(dataset.names), {}       # broken: {name: why}, of all ranks
    if config.data and pictures < config.batch:
        fail(f"--data {config.data}: {pictures} pictures are fewer than --batch "
             f"{config.batch}; add pictures or lower --batch")
    report_x, report_label, found = collate([dataset[n] for n in range(16)])    # new, of this rank

    def too_many():
        return 2 * (len(broken) + len(found.keys() - broken.keys())) > pictures > 0

    def fail_for_pictures():
        name, why = next(iter((broken | found).items()))
        fail(f"--data {config.data}: more than half cannot be read, {len(broken | found)} of "
             f"{pictures} so far; {printable(name)}: {why}")

    if too_many():
        fail_for_pictures()
    classes = len(dataset.classes)

    # -- model
    if not config.shard:                    # shares move there one by one: no GPU has to hold all
        model.to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    if config.compile == "on":
        budget = memory_budget(model, config.memory_budget)
        torch._functorch.config.activation_memory_budget = budget
        torch._dynamo.config.recompile_limit = 64       # one for each shape of block
    options = compile_options(device)
    for block in residual_blocks(model):
        if config.compile == "on" and config.shard:     # shares are put together outside of it
            block.forward = torch.compile(block.forward, dynamic=False, options=options)
    if config.recompute:
        recompute_blocks(model)
    if config.shard:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        for part in [*residual_blocks(model), model, *residual_blocks(ema), ema]:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), config.lr, betas=(0.9, 0.99), eps=1e-12,
                                  weight_decay=0, fused=True)
    logsnr = logsnr_schedule(config.schedule, config.res, config.noise_d)

    # -- the run's folder, which belongs to rank 0 of one command at a time
    out, start, seconds = Path(config.out), 0, 0.0
    log, named, newest, reports, trouble = open_folder(out, config.timeout, at_exit) if master \
        else (None, set(), None, [], None)
    if ddp:
        seen = [newest, trouble, reports]
        dist.broadcast_object_list(seen, group=meet)
        newest, trouble, reports = seen
    if trouble:
        fail(trouble)

    # -- resume
    skipped = torch.zeros((), device=device)
    if newest:
        start, seconds, before, at_a_time = restore(newest, config, dataset, model, ema, optimizer)
        skipped += before
        # Other parts give the same sum to rounding. On a CPU, runs go on to the last bit.
        same = device.type == "cpu" and at_a_time < share // parts and share % at_a_time == 0
        if not config.accum and same:
            parts, why = share // at_a_time, "as it began"
    if master:
        trim(log, start)
        for pattern in (CHECKPOINTS, "model.pt", "grid*.png"):      # left by a kill
            for part in out.glob(pattern + ".part"):
                part.unlink()

    def report_due(done):
        return done and config.sample_every and \
            (done % config.sample_every == 0 or done in (FIRST_REPORT, config.steps))

    # A report that a signal cut short is made up for, even if nothing else is left to do.
    late = report_due(start) and f"grid-{start:07d}.png" not in reports
    if start >= config.steps and not late:
        if master:
            print(f"{out} is at step {start} of {config.steps}: done. "
                  f"More: --steps {2 * start}. Pictures: python sample.py --ckpt {out}/model.pt")
        return
    net = model
    if config.compile == "on" and not config.shard:
        model.compile(options=options, dynamic=False)
    if ddp and not config.shard:
        net = DDP(model, [device.index] if cuda else None, gradient_as_bucket_view=True)

    # -- in as many parts as fit: --shard's ranks talk in each of them, so they cannot try
    try_it = not config.accum and not config.shard and device.type in RAISES
    # Besides a first part's gradient: that of the parts before it, Adam's moments, if they are new.
    reserve = sum(weights.numel() for weights in model.parameters()) * (4 if start else 12)
    while try_it and start < config.steps:
        if master:
            first = "compiling, a minute or two, then " if config.compile == "on" else ""
            print(f"{first}trying {share // parts} pictures at a time ...".capitalize(), flush=True)
        with net.no_sync() if ddp else nullcontext():
            fits = torch.tensor(rehearse(net, vars(config), logsnr, report_label[:1].to(device),
                                         share // parts, reserve + int(BASE), autocast)).int()
        if ddp:
            dist.all_reduce(fits, dist.ReduceOp.MIN, meet)
        if fits:
            break
        if parts == share:
            fail(f"--res {config.res} --model {config.model}: {device.type} is out of memory even "
                 "with one picture at a time; --recompute or a smaller --model takes less")
        parts, why = divisor(share, 2 * parts), "more did not fit"
    micro = share // parts

    if master:
        announce(config, model, dataset, world, device.type, start, parts, why)

    # -- loader: picture numbers of this rank, step by step, from where the run stands
    def numbers():
        for step in range(start, config.steps):
            for part in range(parts):
                first = step * config.batch + (part * world + rank) * micro
                yield range(first, first + micro)

    workers = config.workers
    if workers < 0:
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        workers = min(8, cores) if cuda else 0
    loader = iter(DataLoader(dataset, batch_sampler=numbers(), num_workers=workers,
                             collate_fn=collate, pin_memory=cuda, worker_init_fn=ignore_signals))
    if workers:
        at_exit.callback(loader._shutdown_workers)      # which heed no signal

    # -- reports: a grid from fixed noise and the loss by noise level, the work shared by all ranks
    columns = min(classes, 10) or 8
    shown = columns * (4 if side(config.res) <= 128 else 1)
    _, report_eps, _ = draw_noise(config.seed + 1, 0, 16, config.res, device)
    report_set = [part.to(device).split(4) for part in (report_x, report_eps, report_label)]
    report_set, report_label = list(zip(*report_set)), report_label.to(device)

    @torch.no_grad()
    def report():
        """Loss of the EMA by noise level, and on rank 0 its pictures: the same noise each time."""
        times = (torch.arange(NOISE_LEVELS, device=device) + .5) / NOISE_LEVELS
        mine, drawn, parts = range(rank, max(shown, world), world), None, [None] * world
        label = report_label[[i % 16 for i in mine]]    # captions of the pictures above, all lying
        label[:, :2] = torch.tensor([(i % max(classes, 1), 0) for i in mine])
        fresh = picture_noise(config.seed, mine, config.res, device)

        def noise():
            stop = torch.tensor(bool(asked)).int()
            if ddp:                         # told to one: all leave at the same call of the network
                dist.all_reduce(stop, dist.ReduceOp.MAX, meet)
            if stop:
                raise InterruptedError
            return fresh()

        try:
            with autocast:
                losses = [sum(diffusion_loss(ema, x, t.expand(4), eps, logsnr, label).item() / 4
                              for x, eps, label in report_set) for t in times]
                drawn = to_uint8(sample(ema, logsnr, noise, REPORT_STEPS, label, bar=master))
        except InterruptedError:            # told to stop: no time for pictures
            pass
        if ddp:
            dist.gather_object(drawn, parts if master else None, group=meet)
        else:
            parts = [drawn]
        if not master or any(part is None for part in parts):
            return None, None
        return losses, grid([parts[i % world][i // world] for i in range(shown)], columns)

    # -- what rank 0 writes
    def save_report(losses, sheet):
        known = [loss if math.isfinite(loss) else None for loss in losses]
        append(log, json.dumps(dict(step=done, loss_by_noise_level=known)))
        tqdm.write(f"step {done}: loss from clean to noisy "
                   + " ".join(f"{loss:.4f}" for loss in losses))
        for name in (f"grid-{done:07d}.png", "grid.png"):
            write(out / name, lambda file: sheet.save(file, "PNG"))

    def save(content, rest):
        # model.pt first: a run whose last checkpoint stands is done.
        write(out / "model.pt", lambda file: torch.save(content, file))
        write(out / f"ckpt-{done:08d}.pt", lambda file: torch.save(content | rest, file))
        for old in sorted(out.glob(CHECKPOINTS))[:-2]:
            old.unlink()

    def name_broken():
        """Each broken file once a run, whichever rank met it first."""
        for name, why in (dataset.unread | broken).items():
            if printable(name) not in named:
                tqdm.write(f"skipped {printable(name)}: {why}")
                named.add(printable(name))
                with open(out / "broken.txt", "a", encoding="utf-8") as file:
                    file.write(f"{printable(name)}\t{why}\n")

    def attempt(write_files):
        """A full disk costs these files, not the run -> whether they were written."""
        try:
            write_files()
            return True
        except OSError as error:
            tqdm.write(f"step {done}: {error.filename or out}: {error.strerror or error}; the run "
                       "goes on and will try again")

    def last_good():
        return max(out.glob(CHECKPOINTS), default="none yet")

    # -- loop
    asked = []                              # SIGTERM and Ctrl-C end the run after the step
    hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)         # the terminal is gone, no nohup
    if signal.getsignal(hang_up) == signal.SIG_IGN:
        hang_up = signal.SIGTERM
    for end in {signal.SIGTERM, signal.SIGINT, hang_up}:
        before = signal.signal(end, lambda signum, frame: asked.append(signum))
        at_exit.callback(signal.signal, end, before)
    model.train()
    multiscale = config.multiscale == "on"
    bar = tqdm(total=config.steps, initial=start, disable=not master, unit="step")
    at_exit.callback(bar.close)
    total = torch.zeros(2, device=device)   # sum and number of the losses since the last log line
    in_a_row, most_in_a_row = (torch.zeros((), device=device) for _ in range(2))
    news = torch.zeros((), pin_memory=cuda)
    clock, last, kept, done = time.time(), start, True, start

    def report_now():
        losses, sheet = report()
        if sheet:
            attempt(lambda: save_report(losses, sheet))

    if late:
        report_now()
    for step in range(start, config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1, (step + 1) / config.warmup)
        torch.manual_seed(seed_of(DROPOUT, config.seed, step, rank))

        for part in range(parts):
            x, label, skips = next(loader)
            found |= skips
            first = step * config.batch + (part * world + rank) * micro
            t, eps, u = draw_noise(config.seed, first, micro, config.res, device)
            x, label = x.to(device, non_blocking=True), label.to(device, non_blocking=True)
            dropped = (u < config.drop_label)[:, None]
            label = torch.where(dropped, unconditional(label, classes), label)
            wait = ddp and not config.shard and part < parts - 1
            with net.no_sync() if wait else nullcontext():
                with autocast:
                    loss = diffusion_loss(net, x, t, eps, logsnr, label, config.loss, multiscale,
                                          config.bias)
                (loss / parts).backward()
            loss = loss.detach()
            total += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite().float()])

        norm = whole_of(torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip))
        # All ranks have the same gradient, so all skip together, inside AdamW, without a wait.
        optimizer.found_inf = (~norm.isfinite()).float()
        skipped += optimizer.found_inf
        in_a_row = (in_a_row + 1) * optimizer.found_inf
        most_in_a_row = torch.maximum(most_in_a_row, in_a_row)
        if device.type != "mps" or not optimizer.found_inf:     # whose AdamW does not look
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(shares(ema.parameters()), shares(model.parameters()),
                                 1 - ema_decay(step, config.ema))
        bar.update()
        done = step + 1

        # Reasons to end, agreed on by all ranks. From a GPU they may be some steps old: no wait.
        news.copy_(most_in_a_row, non_blocking=done < config.steps)
        orphan = "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT
        ends = torch.tensor([bool(asked) or orphan, news >= NOT_FINITE_AT_MOST, too_many()]).int()
        if ddp:
            dist.all_reduce(ends, dist.ReduceOp.MAX, meet)
        stop, diverged, unreadable = ends.tolist()
        if diverged:
            bar.close()
            fail(f"step {done}: the last {NOT_FINITE_AT_MOST} gradients were not finite; the last "
                 f"good checkpoint is {last_good()}; a new --out with a lower --lr may do", 1)

        if done % config.log_every == 0 or done in (1, config.steps) or stop or unreadable:
            if ddp:
                dist.all_reduce(total)
                every = [None] * world
                dist.all_gather_object(every, found, meet)
                found = dict(ChainMap(*every))
            broken, found = found | broken, {}
            mean = (total[0] / total[1]).item()     # waits for the GPU: before the clock
            took = time.time() - clock
            seconds = round(seconds + took, 1)
            images_s = round((done - last) * config.batch / took, 1)
            line = dict(step=done, loss=mean, norm=norm.item(), lr=group["lr"],
                        skipped=int(skipped), images_per_second=images_s, seconds=seconds)
            if master:
                bar.set_postfix(loss=f"{mean:.3g}", images_s=images_s)
                attempt(name_broken)
                attempt(lambda: append(log, json.dumps({
                    key: value if math.isfinite(value) else None for key, value in line.items()})))
            total.zero_()
            clock, last = time.time(), done
        if unreadable:
            bar.close()
            fail_for_pictures()
        if done % config.save_every == 0 or done in (FIRST_REPORT, config.steps) or stop:
            moments = [part for state in optimizer.state.values() for part in state.values()]
            sound = finite(shares([*model.parameters(), *ema.parameters(), *moments])).int().cpu()
            if ddp:
                dist.all_reduce(sound, dist.ReduceOp.MIN, meet)
            if not sound:
                bar.close()
                fail(f"step {done}: weights are no longer finite, nothing was saved; the last good "
                     f"checkpoint is {last_good()}; a new --out with a lower --lr may do", 1)
            content = dict(format=FORMAT, config=vars(config), classes=dataset.classes, step=done,
                           ema=whole_of(ema.state_dict(), master))
            rest = dict(pictures=pictures, seconds=seconds, skipped=int(skipped), at_a_time=micro,
                        model=whole_of(model.state_dict(), master),
                        optimizer=whole_of(optimizer.state_dict(), master))
            kept = [attempt(lambda: save(content, rest)) if master else None]
            del content, rest
            if ddp:
                dist.broadcast_object_list(kept, group=meet)
            kept = kept[0]
        if report_due(done) and not stop:
            report_now()
        if stop:
            break
    bar.close()
    if master and broken:
        print(f"{len(broken)} of {pictures} pictures could not be read and were skipped: "
              f"{out}/broken.txt")
    if not kept:
        fail(f"step {done}: not saved; the last good checkpoint is {last_good()}, and the same "
             "command goes on from there", 1)
    if master and done < config.steps:
        print(f"stopped and saved at step {done}: the same command goes on")
    elif master:
        grid_is = f"{out}/grid.png" if (out / "grid.png").exists() else "no grid yet"
        print(f"done: {grid_is}, {out}/model.pt. Pictures: python sample.py --ckpt {out}/model.pt")


def command():
    """`python train.py`: main, its exit code, and nothing left behind."""
    sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: the same command goes on from the last checkpoint")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if dist.is_initialized() and code:
        os._exit(code)              # the others may be gone or stuck: no farewell
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


if __name__ == "__main__":
    command()
