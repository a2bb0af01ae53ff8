"""The trainer (Appendix B): Adam or Muon (ours), warm-up, clipping, EMA; on CPUs and GPUs.

    python train.py                              flowers at 64 x 64, on any machine
    torchrun --nproc_per_node=8 train.py --res 512 --data PATH

`train` is the recipe. The n-th training example, counted over all epochs, has its picture, its t
and its noise fixed by the seed and n. So the gradient is the same, up to rounding and dropout
masks, on one GPU or many and however many parts a batch is computed in (gradient accumulation), and
a run that resumes on as many ranks, in as many parts, is the same as one that never stopped.
Options are in config.py, processes in ranks.py; a Run (run.py) hands out batches, logs and saves.
"""
import copy
from functools import partial

import torch

from checkpoint import build_network, copy_weights, load_model
from cli import fail
from config import parse_config
from data import load_dataset
from loss import diffusion_loss
from memory import agree_on_parts
from muon import Muon
from noise import DROPOUT, draw_noise, seed_of
from ranks import Ranks, clip_gradient, local_shards, step_if_finite
from run import (Run, compile_or_not, has_started, launch, run_command,
                 settings_of_started_run)
from schedule import logsnr_schedule, mean_side
from sid2 import sigmoid_weight


def loss_function(config):
    """The training loss: (model, x, t, eps, cond=...) -> scalar."""
    schedule = logsnr_schedule(config.schedule, config.res, config.noise_d)
    weight = None                                       # the paper's: 1
    if config.loss == "sid2":
        d = mean_side(config.res)                       # the default of the bias depends on it
        weight = partial(sigmoid_weight, schedule=schedule, d=d, b=config.bias)
    return partial(diffusion_loss, schedule=schedule, kind="v" if config.loss == "v" else "eps",
                   multiscale=config.multiscale, coarsest=config.coarsest, weight=weight)


def learning_rate(step, config):
    """At a step: a linear warm-up, then lr; over the last `decay` of the run a linear fall to 0."""
    rise = (step + 1) / config.warmup
    fall = (config.steps - step) / (config.decay * config.steps) if config.decay else 1
    return config.lr * min(1, rise, fall)


def ema_decay(step, max_decay):
    """Decay of the EMA in a step: step / (9 + step), at most max_decay. The warm-up is ours.

    Step 0 copies the model. Without a warm-up 61% of an average with 0.9999 would still be the
    random start at step 5,000. Any small number in place of 9 would do.
    """
    return min(max_decay, step / (9 + step))


@torch.no_grad()
def update_ema(ema_model, model, decay):
    """ema <- decay ema + (1 - decay) weights, for all tensors in one call."""
    # local_shards: all of the weights, or with --shard (FSDP) those that this GPU holds.
    ema, weights = local_shards(ema_model.parameters()), local_shards(model.parameters())
    torch._foreach_lerp_(ema, weights, 1 - decay)


def prepare(config, ranks, loss_fn):
    """-> dataset, parts, settings of the network, model. Exits with one line on wrong input.

    parts: (number of parts a batch is computed in, by gradient accumulation; why so many).
    """
    try:
        dataset = load_dataset(config, ranks)
        classes = len(dataset.classes)
        # The fewest parts that fit the memory of every rank, by an estimate of what a picture and
        # its loss keep for the backward pass.
        parts = agree_on_parts(config, classes, ranks, loss_fn)
        # A resumed run keeps the network it has, also if the preset has changed since.
        settings = settings_of_started_run(config.out) or config.network_settings(classes)
        torch.manual_seed(config.seed)
        model = build_network(**settings)
    except ValueError as error:
        fail(error)
    if config.init and not has_started(config.out):     # a resumed run ignores --init
        try:
            trained, saved = load_model(config.init, "cpu")
            copy_weights(source=trained, target=model,
                         same_classes=saved["classes"] == dataset.classes)
        except ValueError as error:
            fail(f"--init {error}")
    return dataset, parts, settings, model


def train(config, ranks):
    loss_fn = loss_function(config)
    dataset, parts, settings, model = prepare(config, ranks, loss_fn)
    ema_model = copy.deepcopy(model).eval()
    ranks.place(model, ema_model, config)       # to this rank's GPU; with --shard a share of each
    adam = dict(lr=config.lr, betas=(0.9, 0.99), eps=1e-12, fused=True)
    optimizer = torch.optim.Adam(model.parameters(), **adam) if config.optimizer == "adam" else \
        Muon(model, bf16=config.bf16, **adam)   # `laptop`: Muon for matrices, Adam for others
    # Entering a Run loads the last checkpoint, if there is one, into model, EMA and optimizer.
    with Run(config, ranks, dataset, settings, model, ema_model, optimizer, parts) as run:
        wrapped = ranks.wrap(model, config)             # compiled, and DDP
        run.try_memory(wrapped, loss_fn)            # on a GPU, a trial: more parts if need be

        for step in run.steps():                        # from the last checkpoint on
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            # Dropout masks: a seed per step and rank. A run resumed on as many ranks repeats them.
            torch.manual_seed(seed_of(DROPOUT, config.seed, step, ranks.rank))
            losses = []
            for numbers, x, cond, is_last in run.parts_of_batch(step):
                # t, u ~ U(0, 1), eps ~ N(0, 1)
                t, eps, u = draw_noise(config.seed, numbers, config.res, ranks.device)
                cond = cond.dropped(u < config.drop_label)      # 10%, for guidance; captions, too
                with ranks.no_sync(wrapped, unless=is_last):
                    with ranks.autocast(config.bf16):
                        loss = loss_fn(wrapped, x, t, eps, cond=cond)
                    (loss / run.num_parts).backward()
                losses.append(loss.detach())
            norm = clip_gradient(model, config.clip)
            skipped = step_if_finite(optimizer, norm)       # 1: norm was inf or nan, no step
            optimizer.zero_grad(set_to_none=True)
            update_ema(ema_model, model, ema_decay(step, config.ema))
            run.after_step(losses, norm, skipped)       # progress, log, checkpoint, grid


def main(argv=None):
    config = parse_config(argv)
    try:
        ranks = Ranks()
    except ValueError as error:
        fail(error, every_rank=True)
    divisor = ranks.world * (config.accum or 1)
    if config.batch % divisor:
        by_parts = f" x --accum {config.accum}" if config.accum else ""
        fail(f"--batch {config.batch}: must be a multiple of {divisor}, {ranks.world} ranks"
             f"{by_parts}")
    if config.shard and config.optimizer == "muon":
        fail("--shard: Muon needs whole matrices; --set optimizer=adam does not")
    if config.shard and not ranks.distributed:
        fail("--shard: divides the model among ranks, which torchrun starts: see the README")
    config.bf16 = ranks.has_bf16 if config.bf16 is None else config.bf16
    config.compile = compile_or_not(config.compile, ranks.device)
    launch(train, config, ranks)        # train(config, ranks)


if __name__ == "__main__":
    run_command(main)                   # main(), with an exit code and no process left behind
