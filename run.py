"""One run in its folder: resume, steps, log, reports, checkpoints. Nothing of the paper is here.

    ckpt-STEP.pt    the last two checkpoints          grid.png, grid-STEP.png    samples of the EMA
    model.pt        EMA and settings                  log.jsonl, broken.txt      log, skipped files
    index.html      all of it to look at (page.py)

Picture n of a run is the same on any number of ranks, in any number of parts, and after a restart:
step k of a run has the pictures k * batch to (k + 1) * batch - 1, whoever computes them.
"""
import dataclasses
import json
import math
import os
import signal
import sys
import time
import traceback
from collections import ChainMap
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from checkpoint import (FORMAT, KEYS, Uncached, append, build_network, host_copy, lock, read, trim,
                        upgraded, write)
from cli import IgnoreBrokenPipe, fail, written
from data import collate, from_uint8, grid, moved, to_device, to_uint8, too_many_broken
from listing import printable
from loss import diffusion_loss
from memory import BASE, RAISES, divisor, fits, out_of_memory
from muon import state_names
from noise import draw_noise, picture_noise
from page import write_page
from ranks import (StopSignals, all_finite, compiler_trouble, default_model, gather_full,
                   ignore_stop_signals, shard_like)
from sample import asinh_spacing, sampling_steps
from schedule import height_width, logsnr_schedule, mean_side
from uvit import Condition

CHECKPOINTS = "ckpt-" + 8 * "[0-9]" + ".pt"
NOT_FINITE_AT_MOST = 10         # gradients in a row, then the run ends
NOISE_LEVELS = 8                # times at which the loss by noise level is measured
REPORT_STEPS = 18               # network calls for a picture of the grid
FIRST_REPORT = 50               # step of a first checkpoint and grid, however seldom they are


# ---------------------------------------------------------------------------- start and end

def run_command(main):
    """`python train.py`: main, its exit code, and no process left behind."""
    sys.stdout, sys.stderr = IgnoreBrokenPipe(sys.stdout), IgnoreBrokenPipe(sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = 0
    try:
        main()
    except KeyboardInterrupt:
        print("stopped: the same command continues from the last checkpoint")
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if dist.is_initialized() and code:
        os._exit(code)              # the other ranks may be gone or stuck: do not wait for them
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


def launch(train, config, ranks):
    """train(config, ranks), in all ranks together. Lost ranks are named, in one line each."""
    try:
        if not ranks.distributed:
            return train(config, ranks)
        try:
            ranks.join(config.timeout)
        except RuntimeError as error:
            fail(f"rank {ranks.rank} on {ranks.hosts[0]}: the other ranks did not come: "
                 f"{str(error).splitlines()[0]}", code=1, every_rank=True)
        train(config, ranks)
        ranks.wait_and_leave_group()
    except RuntimeError as error:
        if out_of_memory(error):
            fail(f"out of memory ({str(error).splitlines()[0]}): a larger --accum, more parts than "
                 "the start says, takes less; the same command with it goes on from the last "
                 f"checkpoint in {config.out}", code=1, every_rank=True)
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):
            raise
        lost = ranks.unreachable(.1 * 60 * config.timeout)
        if not lost:
            raise
        who = ", ".join(f"rank {rank} on {ranks.hosts[rank]}" for rank in lost)
        print(f"rank {ranks.rank} on {ranks.hosts[ranks.rank]}: no word from {who}; the same "
              f"command goes on from the last checkpoint in {config.out}", file=sys.stderr,
              flush=True)
        os._exit(1)                         # the process group would wait for them


def compile_or_not(wanted, device):
    """--compile, None by default -> True or False. Exits with a line if it cannot be as asked."""
    if not wanted and (wanted is not None or device.type != "cuda"):
        return False
    trouble = compiler_trouble(device)
    if trouble and wanted:
        fail(f"--compile on: {trouble}; --compile off does without", code=1)
    if trouble and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"Training is not compiled, which is slower: {trouble}.", flush=True)
    return not trouble


def has_started(out):
    """Whether this folder holds a checkpoint of a run."""
    return any(Path(out).glob(CHECKPOINTS))


def settings_of_started_run(out):
    """The numbers of the network in the newest checkpoint of a run, if they fit its weights.

    None if they do not, or if there is no checkpoint.
    """
    newest = max(map(str, Path(out).glob(CHECKPOINTS)), default=None)
    try:
        saved = torch.load(newest, mmap=True, map_location="meta", weights_only=True)
        saved = upgraded(saved) if saved["format"] < 3 else saved
        with torch.device("meta"):          # takes no memory, however large the file says it is
            network = build_network(**saved["network"], download=False)
            network.load_state_dict(saved["model"], assign=True)
        return saved["network"]
    except Exception:                       # none, or damaged: `Run` will say so
        return None


class Run:
    """A run: `with Run(...) as run: for step in run.steps(): ...; run.after_step(...)`.

    settings: of the network; parts: in how many of them a rank does its share of a batch, and why.
    """

    def __init__(self, config, ranks, dataset, settings, model, ema, optimizer, parts):
        self.config, self.ranks, self.dataset, self.settings = config, ranks, dataset, settings
        self.model, self.ema, self.optimizer = model, ema, optimizer
        (self.num_parts, self.why), self.share = parts, config.batch // ranks.world
        self.schedule = logsnr_schedule(config.schedule, config.res, config.noise_d)
        self.out, self.done, self.seconds = Path(config.out), 0, 0.0
        self.broken, self.new_broken = {}, {}   # {skipped file: why}: of all ranks, new on this one
        self.total = torch.zeros(2, device=ranks.device)    # sum and number of losses since a line
        self.skipped, self.in_a_row, self.most_in_a_row = torch.zeros(3, device=ranks.device)
        self.writing, self.copies = None, None      # a save that a thread writes; what it writes
        self.watched, self.board = False, None      # whether there is a page; TensorBoard's writer
        self.exits = ExitStack()

    def __enter__(self):
        x, cond, self.new_broken = collate([self.dataset[n] for n in range(16)])
        self.report_pictures = from_uint8(x), cond
        with ExitStack() as self.exits:
            newest, reports = self.open_folder()
            self.writer = self.exits.enter_context(ThreadPoolExecutor(1))
            resumed_parts = self.restore(newest) if newest else 0
            if resumed_parts and not self.config.accum:
                self.num_parts, self.why = resumed_parts, "as it began"
            if self.ranks.is_first:
                self.remove_leftovers()
            self.saved_at = None
            self.missed_report = self.report_due() and f"grid-{self.done:07d}.png" not in reports
            self.exits = self.exits.pop_all()
        return self

    def __exit__(self, *error):
        if self.watched and error[0]:
            self.write_page("failed")
        self.exits.close()

    # -- the folder

    def open_folder(self):
        """Lock the folder, made if need be -> newest checkpoint or None, names of grids.

        It belongs to rank 0 of one command at a time. Exits with one line if it cannot be used.
        """
        newest, reports, trouble = None, [], None
        if self.ranks.is_first:
            try:
                newest, reports = self.open_folder_here()
            except BlockingIOError:
                trouble = (f"--out {self.out}: another process trains there; end that, or give a "
                           "new --out")
            except OSError as error:
                trouble = f"--out {self.out}: cannot be written to ({error.strerror or error})"
        newest, reports, trouble = self.ranks.from_first((newest, reports, trouble))
        if trouble:
            fail(trouble)
        return newest, reports

    def open_folder_here(self):
        self.out.mkdir(parents=True, exist_ok=True)
        # A process that was told to stop may still be saving; the other ranks wait --timeout.
        self.log = lock(self.out / "log.jsonl", min(60, int(24 * self.config.timeout)))
        self.exits.callback(self.log.close)
        if not os.access(self.out, os.W_OK):
            raise PermissionError("read-only")
        newest = max(map(str, self.out.glob(CHECKPOINTS)), default=None)
        ours = (self.out / "log.jsonl").read_bytes()[:7] in (b"", b'{"step"')
        if not ours and not newest:
            raise PermissionError("its log.jsonl is not of a run")
        self.named = set()
        if (self.out / "broken.txt").exists():
            lines = (self.out / "broken.txt").read_text("utf-8", "replace").splitlines()
            self.named = {line.split("\t")[0] for line in lines}
        return newest, [file.name for file in self.out.glob("grid-*.png")]

    def remove_leftovers(self):
        """Of a killed process: log lines after the checkpoint, half-written files."""
        trim(self.log, self.done)
        for pattern in (CHECKPOINTS, "model.pt", "grid*.png", "listing-*.pt", "index.html"):
            for part in self.out.glob(pattern + ".part"):
                part.unlink()

    def last_good(self):
        return max(self.out.glob(CHECKPOINTS), default="none yet")

    # -- resume

    def restore(self, file):
        """Go on from a checkpoint -> the parts that this rank has to keep, 0 if it may choose.

        Exits with one line if it is damaged or was started with other settings or pictures.
        """
        config, pictures, classes = self.config, len(self.dataset.names), self.dataset.classes
        try:
            saved = read(file)
        except ValueError as error:
            older = sorted(map(str, self.out.glob(CHECKPOINTS)))[:-1] or ["the start"]
            fail(f"{error}; without that file the run goes on from {older[-1]}")
        self.check_settings(saved["config"])
        if (saved.get("pictures"), len(saved["classes"])) != (pictures, len(classes)):
            unread = "; ".join(self.dataset.unread.values())
            fail(f"{self.out} was started with {saved.get('pictures')} pictures in "
                 f"{len(saved['classes'])} classes, now {pictures} in {len(classes)}: put them "
                 f"back, or give a new --out{f' ({unread})' * bool(unread)}")
        names = self.dataset.code
        if saved["classes"] != classes or saved.get("names", names) != names:
            fail(f"{self.out} was started with pictures or classes of other names: put them back, "
                 "or give a new --out")
        try:
            at_a_time = saved.get("at_a_time", config.batch)
            assert isinstance(at_a_time, int) and at_a_time > 0
            self.done, self.seconds = saved["step"], float(saved["seconds"])
            self.skipped += int(saved["skipped"])
            self.load_weights(saved)
        except Exception:
            fail(f"{file}: does not hold the network its configuration describes, or not whole")
        # Other parts give the same sum to rounding. On a CPU, runs go on to the last bit.
        fits_too = at_a_time < self.share // self.num_parts and self.share % at_a_time == 0
        return self.share // at_a_time if self.ranks.device.type == "cpu" and fits_too else 0

    def check_settings(self, before):
        fields = {field.name: field for field in dataclasses.fields(self.config)}
        for name in dict.fromkeys([*fields, *before]):
            field, now = fields.get(name), getattr(self.config, name, None)
            was = before.get(name, field.default if field else None)    # older than this setting
            if now == was or field and field.metadata.get("may_change"):
                continue
            setting = written(field, was) if field else f"--set {name}={was}"
            if now is None or isinstance(now, bool):
                now = {True: "on", False: "off", None: "the default"}[now]
            fail(f"{self.out} was started with {setting}, now {now}: go back to that, or give a "
                 "new --out")

    def load_weights(self, saved):
        """Model, EMA and optimizer. Raises anything if a part is missing, misshapen, not finite."""
        for net, weights in ((self.model, saved["model"]), (self.ema, saved["ema"])):
            net.load_state_dict(shard_like(net.state_dict(), weights))
        state = saved["optimizer"]["state"]     # load_state_dict does not check its shapes
        moments = [part for parts in state.values() for part in parts.values()]
        assert all_finite([*saved["model"].values(), *saved["ema"].values(), *moments])
        for i, p in enumerate(self.model.parameters()):
            names = state_names(self.optimizer, p)
            own = {name: p for name in names if name != "step"}
            assert state[i].keys() == set(names) and saved["step"] > 0
            assert all(state[i][name].shape == p.shape for name in own)
            assert state[i]["step"].shape == ()
            state[i] |= shard_like(own, {name: state[i][name] for name in own})
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(dict(state=state, param_groups=groups))

    # -- parts of a batch

    def try_memory(self, wrapped, loss_fn):
        """Try a step's memory on a GPU before the first one; twice the parts until it fits.

        loss_fn: (model, x, t, eps, cond=...) -> the training loss. With --shard the ranks
        communicate in each pass, so they cannot try alone.
        """
        config, kind = self.config, self.ranks.device.type
        if config.accum or config.shard or kind not in RAISES or self.done >= config.steps:
            return
        x, cond = self.report_pictures
        x = x[:1].to(self.ranks.device)
        cond = to_device([p if p is None else p[:1] for p in cond], self.ranks.device)
        # Besides a first part's gradient: the sum of earlier parts, and Adam's moments if new.
        weights = sum(p.numel() for p in self.model.parameters())
        reserve = weights * (4 if self.done else 12) + int(BASE)

        def forward(*args, **options):
            with self.ranks.autocast(config.bf16):
                return loss_fn(*args, **options)

        while True:
            if self.ranks.is_first:
                first = "compiling, a minute or two, then " if config.compile else ""
                print(f"{first}trying {self.share // self.num_parts} pictures at a time ..."
                      .capitalize(), flush=True)
            with self.ranks.no_sync(wrapped):
                fit = fits(forward, wrapped, x, cond, self.share // self.num_parts, reserve)
            if not self.ranks.any(not fit)[0]:
                return
            if self.num_parts == self.share:
                fail(f"--res {config.res} --model {config.model}: {kind} is out of memory even "
                     "with one picture at a time; --recompute or a smaller --model takes less")
            self.num_parts, self.why = divisor(self.share, 2 * self.num_parts), "more did not fit"

    # -- steps

    def steps(self):
        """Steps from where the run stands. It ends early on all ranks if one is told to stop."""
        config, first = self.config, self.ranks.is_first
        if self.done >= config.steps and not self.missed_report:
            if first:
                print(f"{self.out} is at step {self.done} of {config.steps}: done. More: --steps "
                      f"{2 * self.done}. Pictures: python sample.py --ckpt {self.out}/model.pt")
            return
        if first:
            self.announce()
        self.loader = self.start_loader()
        self.signals, self.stopped = self.exits.enter_context(StopSignals()), False
        self.bar = tqdm(total=config.steps, initial=self.done, disable=not first, unit="step")
        self.exits.callback(self.bar.close)
        self.clock, self.logged = time.perf_counter(), self.done
        self.save_clock, self.page_clock, self.page_took = time.monotonic(), 0.0, 0.0
        if first:
            self.watched = True
            self.write_page("training")
            self.to_tensorboard(self.open_tensorboard)
        self.news = torch.zeros((), pin_memory=self.ranks.device.type == "cuda")
        self.model.train()
        if self.missed_report:
            self.report()
        for step in range(self.done, config.steps):
            yield step
            if self.stopped:
                break
        self.bar.close()
        self.say_how_it_ended()

    def announce(self):
        """Print what is about to happen."""
        config, dataset, kind = self.config, self.dataset, self.ranks.device.type
        height, width = height_width(config.res)
        weights = sum(p.numel() for p in self.model.parameters()) / 1e6
        names = ", ".join(map(printable, dataset.classes[:5]))
        names += ", ..." * (len(dataset.classes) > 5)
        about = f"{len(dataset.classes)} classes ({names})" if names else "no classes"
        if config.text:
            about = f"captions of {dataset.captioned if config.data else 'all'} pictures"
        print(f"{config.model} {config.architecture}, {weights:.1f} M weights, {height} x {width}, "
              f"{about}, batch {config.batch} on {self.ranks.world} x {kind}"
              f"{' in bf16' if config.bf16 else ''}, steps {self.done} to {config.steps}.")
        defaults = [default_model(config.res, cuda) for cuda in (False, True)]
        if config.model == defaults[kind == "cuda"] and defaults[0] != defaults[1]:
            print("Default --model at this size: {} without CUDA, {} with CUDA.".format(*defaults))
        steps = config.save_every if config.sample_every is None else config.sample_every
        often = "never" if steps == 0 else f"every {config.save_minutes:g} minutes" \
            if steps is None else f"every {steps} steps"
        often += f", first at step {min(steps or FIRST_REPORT, FIRST_REPORT)}" * (steps != 0)
        parts = f"{self.num_parts} part{'s' * (self.num_parts > 1)}"
        print(f"Each step: {self.share} pictures{' on each rank' * (self.ranks.world > 1)} in "
              f"{parts} of {self.share // self.num_parts} ({self.why}).\n"
              f"Everything goes to {self.out}/; its grid.png shows samples {often}. "
              f"Stop at any time: the same command resumes.\nA page to watch it in a browser: "
              f"{(self.out / 'index.html').absolute().as_uri()}", flush=True)

    def start_loader(self):
        config, cuda = self.config, self.ranks.device.type == "cuda"
        workers = config.workers
        if workers is None:
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = min(8, cores) if cuda else 0
        numbers = (self.picture_numbers(step, part) for step in range(self.done, config.steps)
                   for part in range(self.num_parts))
        loader = iter(DataLoader(self.dataset, batch_sampler=numbers, num_workers=workers,
                                 collate_fn=collate, pin_memory=cuda,
                                 worker_init_fn=ignore_stop_signals))
        if workers:                         # its processes ignore signals
            self.exits.callback(loader._shutdown_workers)
        return loader

    def picture_numbers(self, step, part):
        """The running numbers of the pictures that this rank learns in one part of a step."""
        size = self.share // self.num_parts
        first = step * self.config.batch + (part * self.ranks.world + self.ranks.rank) * size
        return range(first, first + size)

    def parts_of_batch(self, step):
        """Yields each part of a step: numbers of its pictures, x, their Condition, if it is the
        last.
        """
        for part in range(self.num_parts):
            x, cond, skipped = next(self.loader)
            self.new_broken |= skipped
            x = from_uint8(moved(x, self.ranks.device))
            if self.ranks.device.type == "cpu" and not self.config.compile:     # 3% faster
                x = x.contiguous(memory_format=torch.channels_last)
            cond = to_device(cond, self.ranks.device)
            yield self.picture_numbers(step, part), x, cond, part == self.num_parts - 1

    def after_step(self, losses, norm, skipped):
        """Progress, log, checkpoint, report. losses: of the parts; norm: of the gradient;
        skipped: 1.0 if the gradient was not finite.
        """
        config, losses = self.config, torch.stack(losses)
        self.done += 1
        self.bar.update()
        self.total += torch.stack([losses.nan_to_num(0, 0, 0).sum(), losses.isfinite().sum()])
        self.skipped += skipped
        self.in_a_row = (self.in_a_row + 1) * skipped
        self.most_in_a_row = torch.maximum(self.most_in_a_row, self.in_a_row)
        # From a GPU this number may be some steps old: nobody waits for it.
        self.news.copy_(self.most_in_a_row, non_blocking=self.done < config.steps
                        and self.ranks.device.type == "cuda")
        self.stopped, diverged, unreadable, is_time = self.ranks.any(
            self.signals.received or self.ranks.was_orphaned(),
            self.news >= NOT_FINITE_AT_MOST, self.too_many_broken(), self.is_time_to_save())
        if diverged or unreadable:              # the others would not wait for the first rank
            self.ranks.from_first(self.last_save_is_written())
        if diverged:
            self.bar.close()
            fail(f"step {self.done}: the last {NOT_FINITE_AT_MOST} gradients were not finite; the "
                 f"last good checkpoint is {self.last_good()}; a new --out with a lower --lr may "
                 "do", code=1)
        last = self.done == config.steps or self.stopped or unreadable
        if self.done % config.log_every == 0 or self.done == 1 or last:
            self.write_log(norm)
        if unreadable:
            self.bar.close()
            self.fail_for_pictures()
        if last or is_time or self.done == FIRST_REPORT \
                or config.save_every and self.done % config.save_every == 0:
            self.save()
        if self.report_due() and not self.stopped:
            self.report()

    def say_how_it_ended(self):
        if self.ranks.is_first and self.broken:
            print(f"{len(self.broken)} of {len(self.dataset.names)} pictures could not be read and "
                  f"were skipped: {self.out}/broken.txt")
        if not self.ranks.from_first(self.last_save_is_written()):
            fail(f"step {self.done}: not saved; the last good checkpoint is {self.last_good()}, "
                 "and the same command goes on from there", code=1)
        if self.ranks.is_first:
            self.write_page("finished" if self.done == self.config.steps else "stopped")
        if self.ranks.is_first and self.done < self.config.steps:
            print(f"stopped and saved at step {self.done}: the same command goes on")
        elif self.ranks.is_first:
            grid_is = f"{self.out}/grid.png" if (self.out / "grid.png").exists() else "no grid yet"
            print(f"done: {grid_is}, {self.out}/model.pt. "
                  f"Pictures: python sample.py --ckpt {self.out}/model.pt")

    # -- pictures that cannot be read

    def too_many_broken(self):
        pictures, new = len(self.dataset.names), self.new_broken.keys() - self.broken.keys()
        return 2 * (len(self.broken) + len(new)) > pictures > 0

    def fail_for_pictures(self):
        fail(too_many_broken(self.config.data, self.broken | self.new_broken,
                             len(self.dataset.names)))

    def name_broken(self):
        """Each skipped file once a run, whichever rank met it first."""
        for name, why in (self.dataset.unread | self.broken).items():
            if printable(name) not in self.named:
                with open(self.out / "broken.txt", "a", encoding="utf-8") as file:
                    file.write(f"{printable(name)}\t{why}\n")
                tqdm.write(f"skipped {printable(name)}: {why}")
                self.named.add(printable(name))

    # -- log and checkpoints

    def attempt(self, write_files, step=None):
        """Call it -> whether it raised no OSError: a full disk costs these files, not the run."""
        step = step or self.done
        try:
            write_files()
            return True
        except OSError as error:
            tqdm.write(f"step {step}: {error.filename or self.out}: "
                       f"{error.strerror or error}; the run goes on and will try again")
            return False

    def write_log(self, norm):
        """A line of log.jsonl: losses since the last line, over all ranks."""
        self.ranks.sum(self.total)
        self.broken |= dict(ChainMap(*self.ranks.gather(self.new_broken)))
        self.new_broken = {}
        loss = (self.total[0] / self.total[1]).item()   # waits for the GPU: before the clock
        took = max(1e-6, time.perf_counter() - self.clock)
        self.seconds += took
        speed = round((self.done - self.logged) * self.config.batch / took, 1)
        line = dict(step=self.done, loss=loss, norm=norm.item(),
                    lr=self.optimizer.param_groups[0]["lr"], skipped=int(self.skipped),
                    images_per_second=speed, seconds=round(self.seconds, 1))
        if self.ranks.is_first:
            self.bar.set_postfix(loss=f"{loss:.3g}", images_s=speed)
            self.attempt(self.name_broken)
            self.attempt(lambda: append(self.log, json.dumps({      # JSON knows no NaN
                key: value if math.isfinite(value) else None for key, value in line.items()})))
            self.to_tensorboard(lambda: [self.board.add_scalar(key, line[key], self.done) for key in
                                         ("loss", "norm", "lr", "images_per_second")])
            if time.monotonic() - self.page_clock > max(10, 300 * self.page_took):
                self.write_page("training")     # at most 0.3% of the time
        self.total.zero_()
        self.clock, self.logged = time.perf_counter(), self.done

    def write_page(self, state):
        start, named = time.monotonic(), sorted(self.named)
        self.attempt(partial(write_page, self.out, vars(self.config), state, named))
        self.page_clock = time.monotonic()
        self.page_took = self.page_clock - start

    def open_tensorboard(self):
        from torch.utils.tensorboard import SummaryWriter
        self.board = SummaryWriter(self.out, purge_step=self.done + 1)
        self.exits.callback(self.to_tensorboard, lambda: self.board.close())

    def to_tensorboard(self, write):
        """With --tensorboard: call write(). After an OSError, such as a full disk, no more."""
        if self.config.tensorboard and (self.board or write == self.open_tensorboard):
            try:
                write()
            except OSError as error:
                tqdm.write(f"step {self.done}: nothing more for TensorBoard ({error})")
                self.board = None

    def is_time_to_save(self):
        """By the first rank's clock, and never while the last save is being written."""
        return self.ranks.is_first and (self.writing is None or self.writing.done()) \
            and time.monotonic() - self.save_clock >= 60 * self.config.save_minutes

    def last_save_is_written(self):
        """Wait for it -> whether it is on the disk, or none was begun."""
        return self.writing is None or self.writing.result()

    def save(self):
        """model.pt and a checkpoint, copied here and written by a thread while training goes on."""
        ranks, first, shard = self.ranks, self.ranks.is_first, self.config.shard
        gather = partial(gather_full, keep=first, copy=shard)
        self.last_save_is_written()             # one at a time: its copies are used again
        moments = [part for state in self.optimizer.state.values() for part in state.values()]
        sound = all_finite([*self.model.parameters(), *self.ema.parameters(), *moments])
        if ranks.any(not sound)[0]:
            self.bar.close()
            fail(f"step {self.done}: weights are no longer finite, nothing was saved; the last "
                 f"good checkpoint is {self.last_good()}; a new --out with a lower --lr may do",
                 code=1)
        content = dict(format=FORMAT, config=vars(self.config), network=self.settings,
                       classes=self.dataset.classes, step=self.done,
                       ema=gather(self.ema.state_dict()), model=gather(self.model.state_dict()),
                       optimizer=gather(self.optimizer.state_dict()),
                       pictures=len(self.dataset.names), names=self.dataset.code,
                       seconds=self.seconds, skipped=int(self.skipped),
                       at_a_time=self.share // self.num_parts)
        self.saved_at, self.save_clock = self.done, time.monotonic()
        self.to_tensorboard(lambda: self.board.flush())
        if first:
            if not shard:                       # else it is copied already
                content = self.copies = host_copy(content, self.copies)
            self.writing = self.writer.submit(self.attempt, partial(self.write_checkpoint, content),
                                              self.done)

    def write_checkpoint(self, content):
        """Of older checkpoints one stays."""
        model = {key: content[key] for key in KEYS}
        # model.pt first: a run whose last checkpoint exists is complete.
        write(self.out / "model.pt", lambda file: torch.save(model, file), Uncached)
        name = f"ckpt-{content['step']:08d}.pt"
        write(self.out / name, lambda file: torch.save(content, file), Uncached)
        for old in sorted(self.out.glob(CHECKPOINTS))[:-2]:
            old.unlink()

    # -- reports

    def report_due(self):
        often, last = self.config.sample_every, self.config.steps
        if not self.done or often == 0:
            return False
        return self.done in (FIRST_REPORT, last) or (
            self.done % often == 0 if often else self.done == self.saved_at)

    @torch.no_grad()
    def report(self):
        """Losses of the EMA by noise level, and a grid of samples: from the same noise each time.

        All ranks share the work; a signal to one of them ends it on all, without a report.
        """
        with self.ranks.autocast(self.config.bf16):
            losses = self.losses_by_noise_level()
            drawn = self.ranks.gather_to_first(self.draw_samples())
        if not self.ranks.is_first or any(part is None for part in drawn):
            return
        world, (columns, count) = self.ranks.world, self.grid_shape()
        sheet = grid([drawn[i % world][i // world] for i in range(count)], columns)

        def write_files():
            known = [loss if math.isfinite(loss) else None for loss in losses]
            append(self.log, json.dumps(dict(step=self.done, loss_by_noise_level=known)))
            tqdm.write(f"step {self.done}: loss from clean to noisy "
                       + " ".join(f"{loss:.4f}" for loss in losses))
            for name in (f"grid-{self.done:07d}.png", "grid.png"):
                write(self.out / name, lambda file: sheet.save(file, "PNG"))

        self.attempt(write_files)
        self.write_page("training")
        self.to_tensorboard(lambda: [
            self.board.add_image("samples", np.asarray(sheet), self.done, dataformats="HWC"),
            *(self.board.add_scalar(f"loss_by_noise_level/{level}", loss, self.done)
              for level, loss in enumerate(losses))])

    def losses_by_noise_level(self):
        """The eps loss with weight 1 on the first 16 pictures, at times 1/16, 3/16, ..., 15/16."""
        device, (x, cond) = self.ranks.device, self.report_pictures
        _, eps, _ = draw_noise(self.config.seed + 1, range(16), self.config.res, device)
        losses = []
        for level in range(NOISE_LEVELS):
            t = torch.full((4,), (level + .5) / NOISE_LEVELS, device=device)
            parts = [diffusion_loss(self.ema, x[i:i + 4].to(device), t, eps[i:i + 4], self.schedule,
                                    to_device([p if p is None else p[i:i + 4] for p in cond],
                                              device)) for i in (0, 4, 8, 12)]
            losses.append(sum(part.item() for part in parts) / 4)
        return losses

    def grid_shape(self):
        """Columns, and number of pictures: a column per class, or 8; one row of large pictures."""
        columns = min(len(self.dataset.classes), 10) or 8
        return columns, columns * (4 if mean_side(self.config.res) <= 128 else 1)

    def draw_samples(self):
        """This rank's pictures of the grid, uint8; None if any rank is told to stop meanwhile."""
        ranks, classes = self.ranks, len(self.dataset.classes)
        mine = range(ranks.rank, max(self.grid_shape()[1], ranks.world), ranks.world)
        tokens = self.report_pictures[1].tokens     # the captions of the first 16 pictures
        cond = Condition(torch.tensor([i % classes if classes else -1 for i in mine]),
                         torch.zeros(len(mine), dtype=torch.long),
                         None if tokens is None else tokens[[i % 16 for i in mine]])
        noise = picture_noise(self.config.seed, mine, self.config.res, ranks.device)
        spacing = asinh_spacing(self.schedule, mean_side(self.config.res))
        steps = sampling_steps(self.ema, spacing, noise, REPORT_STEPS,
                               to_device(cond, ranks.device), "sde")
        bar = dict(leave=False, disable=not ranks.is_first)
        for _, x_hat in tqdm(steps, "sampling", REPORT_STEPS, **bar):
            if ranks.any(self.signals.received)[0]:
                return None
        return to_uint8(x_hat)
