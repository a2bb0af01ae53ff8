"""How much memory training takes, and how many parts a batch is done in so that it fits.

    bytes = 20 for each weight + what the backward pass keeps of one picture * pictures at a time

The 20: weight 4, gradient 4, Adam's two moments 8, moving average 4; without CUDA 16 more, for the
copy of a checkpoint that is being written. What is kept of a picture is counted on the "meta"
device, which computes shapes alone: no memory, and about a second.
"""
import dataclasses
import gc
import math
import os
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint

from checkpoint import build_network
from schedule import height_width
from text import CrossAttentionBlock
from uvit import PRESETS, AttentionBlock, MLPBlock, ResBlock

BASE = 0.5e9                # bytes for decoded pictures, buffers and the like
REPORT = 100                # pictures' bytes that a grid and the losses by noise level take
BF16, COMPILED = 0.75, 0.5  # what is kept under autocast, by compiled code: of float32, of eager
ASSUMED = 8 << 30           # bytes of RAM where the system does not say (Windows)
# Shares of the free memory: COMFORT is planned for, LIMIT is what one picture at a time may need.
# RAM is shared with other programs, and whoever takes too much is killed; a GPU raises an error.
COMFORT = {"cuda": 0.92, "mps": 0.5, "cpu": 0.5}
LIMIT = {"cuda": 1.0, "mps": 0.9, "cpu": 0.9}
# Peak of the backward pass over what was kept for it: a CPU's convolutions work on copies.
BACKWARD = {"cuda": 1.1, "mps": 1.4, "cpu": 1.4}
CPU_PART = 1.5e9            # bytes: a CPU is no faster with more at a time, and slower with many GB
RAISES = {"cuda", "mps"}    # devices where running out of memory can be caught


# ---------------------------------------------------------------------------- what there is

def read_number(file, after=None):
    """The number in a file, or behind the word `after` in it; None if there is none, or "max"."""
    try:
        words = Path(file).read_text().split()
        return int(words[words.index(after) + 1 if after else 0])
    except (OSError, ValueError, IndexError):
        return None


def cgroup_room(root="/sys/fs/cgroup", of="/proc/self/cgroup"):
    """Bytes that the control groups of this process (containers, systemd, Slurm) still allow."""
    room = []
    lines = Path(of).read_text().splitlines() if os.path.exists(of) else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "memory":         # version 1
            top, limit, usage, cache = Path(root, "memory"), "memory.limit_in_bytes", \
                "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
        elif not controllers:               # version 2
            top, limit, usage, cache = Path(root), "memory.max", "memory.current", \
                ("inactive_file", "active_file")
        else:
            continue
        group = top / path.strip("/")
        for folder in (group, *group.parents):      # a limit holds for all groups inside, too
            most, used = read_number(folder / limit), read_number(folder / usage)
            if most is not None and used is not None:
                reclaimable = [read_number(folder / "memory.stat", kind) or 0 for kind in cache]
                room.append(most - used + sum(reclaimable))
            if folder == top:
                break
    return min(room, default=float("inf"))


def ram():
    """Bytes of RAM that may still be used."""
    free = read_number("/proc/meminfo", "MemAvailable:")        # in kB
    if free is not None:
        return max(0, min(free * 1024, cgroup_room()))
    try:                                    # macOS names only what there is in all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return ASSUMED


def available(device):
    """Bytes that this process may still use on its device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return ram() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


# ---------------------------------------------------------------------------- what is needed

def checkpointable_blocks(model):
    """All residual blocks, which hold most of the weights and of the activations."""
    kinds = (ResBlock, MLPBlock, AttentionBlock, CrossAttentionBlock)
    return [part for part in model.modules() if isinstance(part, kinds)]


def recompute_blocks(model):
    """--recompute: keep only the input of each residual block, compute the rest again."""
    for block in checkpointable_blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def kept_per_picture(model, config, loss):
    """Bytes that the backward pass needs of one picture in float32; model: on the meta device."""
    own = {weight.untyped_storage()._cdata for weight in model.parameters()}
    kept, inside, largest = {}, [], 0       # storages: tensor; those of the block that runs

    def keep(tensor):
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            (inside[-1] if inside else kept)[storage] = tensor
        return tensor

    def size(tensors):
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())

    def enter(block, inputs):
        for tensor in inputs:
            if tensor is not None:
                keep(tensor)
        inside.append({})

    def leave(block, inputs, output):
        nonlocal largest
        largest = max(largest, size(inside.pop()))

    hooks = [hook for block in checkpointable_blocks(model) if config.recompute for hook in
             (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
    x = torch.empty(1, 3, *height_width(config.res), device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(model, x, torch.empty(1, device="meta"), torch.empty_like(x))
    for hook in hooks:
        hook.remove()
    return size(kept) + largest


def needed(config, classes, world, device_type, loss):
    """Bytes needed whatever the batch, bytes per picture, number of weights.

    loss: (model, x, t, eps) -> the training loss.
    """
    with torch.device("meta"):
        model = build_network(**config.network_settings(classes))
    weights = sum(weight.numel() for weight in model.parameters())
    whole = config.compile and not config.recompute and not config.shard
    each = kept_per_picture(model, config, loss) * BACKWARD[device_type]
    each *= (BF16 if config.bf16 else 1) * (COMPILED if whole else 1)
    # Ranks add up gradients in buffers of their own; autocast keeps the weights in bf16, too.
    per_weight = 20 + 4 * (world > 1 and not config.shard) + 2 * config.bf16
    frozen = getattr(model.text, "encoder", None)           # a T5, which is not on "meta"
    fixed = sum(weight.nbytes for weight in frozen.parameters()) if frozen else 0
    fixed += BASE + REPORT * 12 * math.prod(height_width(config.res))
    per_weight /= world if config.shard else 1
    if device_type != "cuda":           # the copy that goes to the disk: by one rank of a machine
        per_weight += 16 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return fixed + weights * per_weight, each, weights


# ---------------------------------------------------------------------------- parts of a batch

def divisor(share, least):
    """The smallest divisor of share that is at least `least`, share itself at most."""
    return next((parts for parts in range(max(1, least), share) if share % parts == 0), share)


def parts_that_fit(config, classes, world, device, loss):
    """In how many parts a rank computes its share of the batch -> parts, a line that says why.

    Raises ValueError, in one line, if not even one picture at a time fits.
    """
    share, free = config.batch // world, available(device)
    kind, gb = device.type, 1e9
    fixed, each, weights = needed(config, classes, world, kind, loss)
    room = COMFORT[kind] * free - fixed
    why = (f"{each / gb:.2g} GB a picture, {fixed / gb:.2g} GB for weights and optimizer, "
           f"{free / gb:.3g} GB free")
    if kind == "cpu" and room > CPU_PART:
        room, why = CPU_PART, f"{each / gb:.2g} GB a picture; more at a time is no faster on a CPU"
    if fixed + each <= LIMIT[kind] * free:
        return divisor(share, -(-share // max(1, int(room / each)))), why
    models = [*PRESETS]
    smaller = models[1:models.index(config.model)]      # without `laptop`: not all sizes suit it
    can_shard = world > 1 and config.optimizer != "muon"
    changes = [dict(recompute=True)] + [dict(shard=True)] * can_shard
    would = []
    for change in changes + [dict(model=name) for name in reversed(smaller)]:
        changed = dataclasses.replace(config, **change)
        fixed_then, each_then, _ = needed(changed, classes, world, kind, loss)
        if fixed_then + each_then <= LIMIT[kind] * free:
            would += [f"--{name}" if value is True else f"--{name} {value}"
                      for name, value in change.items()]
            if "model" in change:
                break
    raise ValueError(
        f"--res {config.res} --model {config.model}: {weights / 1e6:,.0f} M weights and one "
        f"picture at a time need {(fixed + each) / gb:.3g} GB of memory, and {free / gb:.3g} GB "
        f"are free; {' or '.join(would) or 'a smaller --res'} would fit")


def agree_on_parts(config, classes, ranks, loss):
    """`parts_that_fit`, the most that one of the ranks needs; --accum if it is given.

    Raises ValueError on all ranks if it does not fit on one.
    """
    if config.accum:
        return config.accum, f"--accum {config.accum}"
    try:
        mine = *parts_that_fit(config, classes, ranks.world, ranks.device, loss), None
    except ValueError as error:
        mine = 0, "", str(error)
    every = ranks.gather(mine)
    for _, _, trouble in every:
        if trouble:
            raise ValueError(trouble)
    return max(every)[:2]


def out_of_memory(error):
    """Whether an exception says that the device's memory is full: each device has its own."""
    words = "out of memory", "allocate memory", "ALLOC_FAILED", "unable to find an engine"
    return isinstance(error, torch.OutOfMemoryError) or any(part in str(error) for part in words)


def fits(forward, net, x, cond, count, reserve):
    """Whether the memory is enough for the forward and backward pass of `count` pictures.

    forward: (net, x, t, eps, cond=...) -> loss; x (1, 3, H, W), cond: of one picture; reserve:
    bytes that training needs besides.
    """
    try:
        _reserved = torch.empty(reserve, dtype=torch.uint8, device=x.device)
        x = x.repeat(count, 1, 1, 1)
        cond = type(cond)(*(p if p is None else p.repeat(count, *[1] * (p.dim() - 1))
                            for p in cond))
        t = torch.full((count,), .5, device=x.device)
        forward(net, x, t, torch.zeros_like(x), cond=cond).backward()
        return True
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        net.zero_grad(set_to_none=True)
        gc.collect()                        # what a failed try still holds in reference cycles
