"""Many processes as one: devices, agreement between ranks, signals, compiling, DDP and shards.

A rank is one process of a run, started by torchrun, usually one per GPU. Without torchrun there is
one, and everything here works for it, too. Gradients travel by NCCL or gloo. What ranks have to
agree on goes through `control`, a gloo group of its own, so that it never waits for a GPU.
"""
import hashlib
import os
import signal
import socket
import time
import uuid
from contextlib import nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from memory import checkpointable_blocks, recompute_blocks
from schedule import mean_side

PARENT = os.getppid()           # under torchrun: torchrun, while it lives
CONNECT_SECONDS = 30            # to reach torchrun, on several nodes the first's; then it is gone


# ---------------------------------------------------------------------------- devices, compiler

def has_cuda():
    """Whether there is a GPU by CUDA or ROCm; DEVICE=cpu in the environment leaves it alone."""
    return torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"


def default_model(res, cuda):
    """The preset that a machine with or without CUDA trains in reasonable time."""
    return "base" if cuda and mean_side(res) > 64 else "laptop"


def pick_device():
    """This rank's device, and whether its hardware has bf16. Raises ValueError."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if has_cuda():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"rank {local_rank} has no GPU of its own: --nproc_per_node is at "
                             f"most {torch.cuda.device_count()} here")
        torch.cuda.set_device(local_rank)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda", local_rank), has_bf16
    if torch.backends.mps.is_available() and not {"DEVICE", "RANK"} & os.environ.keys():
        return torch.device("mps"), False           # one process only: gloo has no MPS
    return torch.device("cpu"), torch.cpu._is_avx512_bf16_supported()


def compiler_trouble(device):
    """Why torch.compile does not work here, in one line; None if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(4, device=device))
    except Exception as error:              # of another kind on each platform
        return f"no compiler works here ({(str(error).splitlines() or [type(error).__name__])[0]})"


def compile_options(device):
    """For torch.compile: convolutions in channels-last layout on a GPU even if one is narrow;
    dropout by torch's own kernel, since inductor's may repeat its masks (pytorch #198333).
    """
    return {"force_layout_optimization": device.type == "cuda", "fallback_random": True}


# ---------------------------------------------------------------------------- ranks

def store_of_those_here(store, rank, world, timeout):
    """torchrun's store -> a part of it for the ranks that meet now. Raises RuntimeError.

    torchrun --max-restarts keeps its store: a restarted rank would find the addresses of ranks that
    have ended (pytorch #135712), and the other nodes' ranks may be yet to restart. So each rank
    leaves a number of its own there, and all wait until they see the same numbers.
    """
    end = time.time() + timeout.total_seconds()
    own = uuid.uuid4().hex
    store.set(f"number {rank}", own)
    while time.time() < end:
        numbers = store.multi_get([f"number {other}" for other in range(world)])    # of all: waits
        if numbers[rank] != own.encode():
            raise RuntimeError(f"another process is rank {rank}")
        seen = hashlib.sha256(b"".join(numbers)).hexdigest()
        store.set(f"seen {rank}", seen)
        if set(store.multi_get([f"seen {other}" for other in range(world)])) == {seen.encode()}:
            return dist.PrefixStore(seen, store)
        time.sleep(.1 + world / 1000)
    raise RuntimeError("they did not start at the same time")


class Ranks:
    """This process among the ranks of a run: `rank` of `world`, its `device`. Raises ValueError if
    it has no GPU of its own.
    """

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.is_first, self.distributed = self.rank == 0, "RANK" in os.environ
        self.device, self.has_bf16 = pick_device()
        self.control = self.probe = None
        self.hosts = [socket.gethostname()]

    def join(self, timeout):
        """Meet the other ranks, within `timeout` minutes. Raises RuntimeError if they do not come.

        All ranks notice one that is silent after 8/10 of the timeout, and have the rest of it to
        find out, through `probe`, which one that is.
        """
        timeout, store = timedelta(minutes=timeout), None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            torchruns = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]),
                                      is_master=False, timeout=timedelta(seconds=CONNECT_SECONDS))
            torchruns.set_timeout(timeout)
            store = store_of_those_here(torchruns, self.rank, self.world, timeout)
        nccl = self.device.type == "cuda"
        dist.init_process_group("nccl" if nccl else "gloo", store=store, rank=self.rank,
                                world_size=self.world, timeout=timeout if nccl else .8 * timeout)
        self.control, self.probe = (dist.new_group(backend="gloo", timeout=.8 * timeout)
                                    for _ in range(2))
        self.hosts = self.gather(self.hosts[0])

    def wait_and_leave_group(self):
        """Wait for the other ranks, then leave the group together."""
        if self.control:
            dist.barrier(self.control)
            dist.destroy_process_group()

    def unreachable(self, seconds):
        """Ranks that do not answer a message within `seconds`, those known to be gone first."""
        gone, silent, sent, answers, end = [], [], [], {}, time.time() + seconds
        for rank in set(range(self.world)) - {self.rank}:
            try:
                sent.append(dist.isend(torch.zeros(1), rank, self.probe))   # kept until it is sent
                answers[rank] = dist.irecv(torch.zeros(1), rank, self.probe)
            except RuntimeError:
                gone.append(rank)
        for rank, answer in answers.items():
            try:
                answer.wait(timedelta(seconds=max(.1, end - time.time())))
            except RuntimeError as error:   # closed; or no answer, maybe for want of a closed one
                late = any(word in str(error) for word in ("Timed out", "timeout"))
                (silent if late else gone).append(rank)
        return sorted(gone or silent)

    # -- agreement

    def any(self, *flags):
        """[whether it is true on any rank, for each flag], the same on all ranks."""
        flags = torch.tensor([bool(flag) for flag in flags]).int()
        if self.control:
            dist.all_reduce(flags, dist.ReduceOp.MAX, self.control)
        return flags.bool().tolist()

    def gather(self, value):
        """[the value of each rank], the same list on all ranks."""
        values = [value] * self.world
        if self.control:
            dist.all_gather_object(values, value, self.control)
        return values

    def gather_to_first(self, value):
        """[the value of each rank] on the first rank, None on the others."""
        values = [value] * self.world if self.is_first else None
        if self.control:
            dist.gather_object(value, values, group=self.control)
        return values

    def from_first(self, value):
        """The first rank's value, on all ranks."""
        values = [value]
        if self.control:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def sum(self, tensor):
        """The sum over all ranks, in place, by the group that gradients take."""
        if self.distributed:
            dist.all_reduce(tensor)
        return tensor

    def was_orphaned(self):
        """Whether torchrun has died: nobody would notice if this rank went on."""
        return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != PARENT

    # -- the model

    def autocast(self, bf16):
        return torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def place(self, model, ema, config):
        """Both to this rank's device; with --shard each rank keeps a share of them (FSDP2)."""
        blocks = checkpointable_blocks(model)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.bf16
        if config.compile:
            torch._dynamo.config.recompile_limit = 64       # one for each shape of block
        if config.compile and config.shard:     # shards are gathered outside of compiled code
            for block in blocks:
                block.forward = torch.compile(block.forward, dynamic=False,
                                              options=compile_options(self.device))
        if config.recompute:
            recompute_blocks(model)
        if not config.shard:
            model.to(self.device), ema.to(self.device)
            return
        from torch.distributed.device_mesh import DeviceMesh    # imports take a second: only here
        from torch.distributed.fsdp import fully_shard
        mesh = DeviceMesh.from_group(dist.group.WORLD, self.device.type)
        for part in [*blocks, model, *checkpointable_blocks(ema), ema]:
            fully_shard(part, mesh=mesh, reshard_after_forward=True)

    def wrap(self, model, config):
        """model -> what the loop calls: compiled, and synchronised by DDP if there are ranks."""
        if config.compile and not config.shard:
            model.compile(options=compile_options(self.device), dynamic=False)
        if self.distributed and not config.shard:
            devices = [self.device.index] if self.device.type == "cuda" else None
            return DDP(model, devices, gradient_as_bucket_view=True)
        return model

    def no_sync(self, wrapped, unless=False):
        """Context in which DDP does not add up gradients; FSDP2 does so in each backward pass."""
        return wrapped.no_sync() if isinstance(wrapped, DDP) and not unless else nullcontext()


def clip_gradient(model, most):
    """Clip the norm of the gradient to `most` -> the norm that it had, of all ranks' shards."""
    return gather_full(torch.nn.utils.clip_grad_norm_(model.parameters(), most))


def step_if_finite(optimizer, norm):
    """The optimizer's step, unless the norm is not finite -> 1.0 if it was skipped, else 0.0.

    All ranks have the same gradient, so all skip together; inside Adam, without waiting for a GPU.
    """
    skipped = (~norm.isfinite()).float()
    optimizer.found_inf = skipped
    if norm.device.type != "mps" or not skipped:        # Adam on MPS ignores found_inf
        optimizer.step()
    return skipped


# ---------------------------------------------------------------------------- shards

def is_sharded(tensor):
    """Whether it is a DTensor of FSDP2, told without importing that class, which takes a second."""
    return hasattr(tensor, "full_tensor")


def local_shards(tensors):
    """What this rank holds of them: of a sharded tensor its shard, else all of it."""
    return [t.to_local() if is_sharded(t) else t for t in tensors]


def shard_like(tensors, whole):
    """{name: whole tensor} -> the same, those sharded whose namesakes in `tensors` are."""
    def shard(name, tensor):
        if not is_sharded(tensors.get(name)):
            return tensor
        from torch.distributed.tensor import distribute_tensor
        own = tensors[name]
        return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements,
                                 src_data_rank=None)

    return {name: shard(name, tensor) for name, tensor in whole.items()}


def gather_full(tree, keep=True, copy=False):
    """A tensor or nested dict with all shards put together; all ranks must call it.

    keep=False: this rank only contributes its shards and gets None for them. copy: all tensors are
    copied to this machine's memory, so that further training does not change them.
    """
    if isinstance(tree, dict):
        return {name: gather_full(part, keep, copy) for name, part in tree.items()}
    if not isinstance(tree, torch.Tensor):
        return tree
    full = tree.full_tensor() if is_sharded(tree) else tree
    if is_sharded(tree) and not keep:
        return None
    return full.to("cpu", copy=True) if copy else full


def all_finite(tensors):
    """Whether all elements are finite: a bool tensor."""
    return torch.nn.utils.get_total_norm(local_shards(tensors)).isfinite()


# ---------------------------------------------------------------------------- signals

class StopSignals:
    """While it is entered, SIGTERM, Ctrl-C and a closed terminal are only noted: `received`."""

    def __enter__(self):
        self.received, self.before = [], {}
        hang_up = getattr(signal, "SIGHUP", signal.SIGTERM)
        if signal.getsignal(hang_up) == signal.SIG_IGN:     # nohup
            hang_up = signal.SIGTERM
        for number in {signal.SIGTERM, signal.SIGINT, hang_up}:
            self.before[number] = signal.signal(
                number, lambda number, frame: self.received.append(number))
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_stop_signals(_=None):
    """For a process that loads pictures: the trainer still needs it when it is told to stop."""
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, signal.SIG_IGN)
