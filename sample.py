"""Sampling (Appendix A): ancestral steps, DDIM and DPM-Solver++, guidance; `python sample.py`.

Sampling goes from unit noise at t = 1 down a uniform grid of times to t = 0; for dpm and sde the
command takes the logsnrs of `asinh_spacing` instead. A step from t to s < t calls the network
once, for x_hat, and draws z_s from z_t and x_hat. The last step returns x_hat.

    sampler     x_hat                      adds noise
    ancestral   at t                       yes          the paper's
    ddim        at t                       no           DDIM (Song et al., 2021)
    dpm         extrapolated to mid-step   no           DPM-Solver++(2M) (Lu et al., 2022)
    sde         extrapolated to mid-step   yes          its variant with noise, SDE-DPM-Solver++(2M)
"""
import math
import signal
import sys

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from checkpoint import SampleFolder, load_model, newest_model
from cli import IgnoreBrokenPipe, fail
from config import parse_sampling
from data import grid, stacked, to_device, to_uint8
from loss import x_from_v
from noise import picture_noise
from ranks import Ranks, compiler_trouble
from schedule import alpha_sigma, logsnr_schedule, mean_side
from text import tokenizer
from uvit import Condition


def ancestral_step(z, x_hat, logsnr_t, logsnr_s, gamma, noise):
    """Ancestral step t -> s (Appendix A): z_t, x_hat, noise: (B, C, H, W); logsnr: (B,) -> z_s.

    mu = alpha_s (z_t (1 - c) / alpha_t + c x_hat), c = 1 - SNR_t / SNR_s. The log variance is
    interpolated between its lower bound, c sigma_s^2 (gamma = 0), and its upper, c sigma_t^2 (1).
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    c = -torch.expm1(logsnr_t - logsnr_s)[:, None, None, None]
    mu = alpha_s * (z * (1 - c) / alpha_t + c * x_hat)
    log_variance = gamma * torch.log(c * sigma_t**2) + (1 - gamma) * torch.log(c * sigma_s**2)
    return mu + torch.exp(log_variance / 2) * noise


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """DDIM step t -> s (Song et al., 2021; not in the paper): the same x_hat and eps_hat at s."""
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t


def x_mid_step(x_hat, logsnr_t, logsnr_s, x_hat_before, logsnr_before):
    """x_hat at the middle of the step t -> s in logsnr, extrapolated from the step before.

    From Lu et al., 2022; not in the paper. If x_hat is constant during a step, DDIM is exact, and
    an ancestral step with gamma = 0 is exact in distribution. With x_hat of the middle the error is
    of second order, as by the midpoint rule: DPM-Solver++(2M) and SDE-DPM-Solver++(2M).
    """
    ratio = (logsnr_s - logsnr_t) / (logsnr_t - logsnr_before)
    return x_hat + ratio[:, None, None, None] / 2 * (x_hat - x_hat_before)


def asinh_spacing(schedule, d, first=-2.3, last=9.0, width=3.0):
    """Not in the paper: logsnrs of the steps for dpm and sde, as a schedule u -> logsnr.

    asinh((logsnr - m) / width) is linear in u: steps are short near m, where the picture averaged
    to 32 x 32 has logsnr 0 (Eq. 4) and shapes form, longer before and after. At u = 1 the average
    of all d x d pixels, which noise hides last, has logsnr `first`; at u = 0 a pixel has `last`.
    Neither is beyond the ends of the schedule. Defaults: by trial with flowers.pt, 128 x 128.
    """
    m = 2 * math.log(32 / d)
    logsnr_first = schedule(torch.ones(1)).clamp(min=first - 2 * math.log(d))
    logsnr_last = schedule(torch.zeros(1)).clamp(max=last)
    at_first, at_last = (torch.asinh((a - m) / width) for a in (logsnr_first, logsnr_last))
    return lambda u: m + width * torch.sinh(at_last + u * (at_first - at_last))


def guided(model, z, logsnr, cond, guidance):
    """v_hat with guidance (Appendix A), with and without condition in one batch.

    eps_hat = (1 + eta) eps_cond - eta eps_uncond, guidance = 1 + eta; 1 is the conditional model.
    eps = sigma z + alpha v, and the two weights sum to 1: combining v_hat like this is the same.
    """
    if guidance == 1:
        return model(z, logsnr, cond).float()
    assert cond is not None, f"guidance {guidance} needs a condition; 1 is off"
    uncond = cond.dropped(torch.ones(len(z), dtype=torch.bool, device=z.device))
    # (B, ...) and (B, ...) -> (2B, ...), field by field.
    both = Condition(*(None if a is None else torch.cat([a, b]) for a, b in zip(cond, uncond)))
    v_hat = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), both).float()
    v_cond, v_uncond = v_hat.chunk(2)
    return guidance * v_cond + (1 - guidance) * v_uncond


@torch.no_grad()
def sampling_steps(model, schedule, new_noise, steps, cond=None, sampler="ancestral", gamma=0.2,
                   guidance=1.0, interval=(-math.inf, math.inf)):
    """Yields (z_t, x_hat), (B, C, H, W) each, of every step; the last x_hat is the sample.

    model: (z, logsnr, cond) -> v_hat;  schedule: t -> logsnr (B,);  new_noise: () -> unit noise
    (B, C, H, W);  sampler: "ancestral", "ddim", "dpm" or "sde";  gamma: 0 to 1, of the ancestral
    one;  interval: of logsnr, outside of which there is no guidance (SiD2).
    """
    assert sampler in ("ancestral", "ddim", "dpm", "sde"), f"no sampler {sampler!r}"
    z, before, was_inside = new_noise(), None, None
    logsnrs = schedule(torch.linspace(1, 0, steps + 1))     # on the CPU, to test `interval`
    for i in range(steps):
        logsnr_t = logsnrs[i].to(z.device).expand(len(z))
        logsnr_s = logsnrs[i + 1].to(z.device).expand(len(z))
        inside = interval[0] <= logsnrs[i] <= interval[1]
        v_hat = guided(model, z, logsnr_t, cond, guidance if inside else 1)
        x_hat = x_from_v(z, v_hat, *alpha_sigma(logsnr_t)).clamp(-1, 1)
        yield z, x_hat
        if i == steps - 1:
            break
        x_step = x_hat
        # No extrapolation where guidance goes on or off, since x_hat jumps, nor at the first step.
        if sampler in ("dpm", "sde") and inside == was_inside:
            x_step = x_mid_step(x_hat, logsnr_t, logsnr_s, *before)
        if sampler in ("ddim", "dpm"):
            z = ddim_step(z, x_step, logsnr_t, logsnr_s)
        else:
            z = ancestral_step(z, x_step, logsnr_t, logsnr_s,
                               gamma if sampler == "ancestral" else 0.0, new_noise())
        before, was_inside = (x_hat, logsnr_t), inside


def sample(*args, **options):
    """Pictures (B, C, H, W) in [-1, 1] by exactly `steps` calls of model; see `sampling_steps`."""
    for _, x_hat in sampling_steps(*args, **options):
        pass
    return x_hat


# ---------------------------------------------------------------------------- the command

def conditions(options, ckpt, config, classes):
    """What to draw in turn: a Condition per prompt, or per class, or one. Their fields are numbers
    and lists; `stacked` makes a batch of tensors of them. A model with captions has no classes.

    Exits with one line if the model was not trained for what was asked.
    """
    without = f"and {ckpt} was trained without"
    if options.prompt and not config["text"]:
        fail(f"--prompt: needs a model with --text, {without}; --ckpt assets/words.pt has it")
    if options.portrait and not config["portrait"]:
        fail(f"--portrait: needs a model with --portrait, {without}")
    if options.label and not classes:
        fail(f"--label {options.label}: needs a model with classes, {without}")
    if options.guidance != 1 and not classes and not config["text"]:
        fail(f"--guidance {options.guidance}: needs a model with classes or text, {without}")
    if options.guidance != 1 and not config["drop_label"]:
        fail(f"--guidance {options.guidance}: {ckpt} was trained with drop_label=0")
    if options.guidance == 1 and options.guidance_interval:
        fail("--guidance-interval: needs a --guidance other than 1")
    portrait, label = int(options.portrait), options.label
    if config["text"]:
        try:
            tokenize = tokenizer(config["text"], config["text_length"], download=False)
        except ValueError as error:
            fail(f"--ckpt {ckpt}: {error}")
        return [Condition(-1, portrait, tokenize(prompt)) for prompt in options.prompt or [""]]
    numbers = range(len(classes)) if classes else [-1]      # -1: no class
    if not label:
        return [Condition(i, portrait, []) for i in numbers]            # []: no caption
    if label not in classes and not (label.isdecimal() and int(label) < len(classes)):
        fail(f"--label {label}: must be one of 0 to {len(classes) - 1}, or of "
             f"{', '.join(classes)}, the classes of --ckpt {ckpt}")
    return [Condition(classes.index(label) if label in classes else int(label), portrait, [])]


def walk(model, options, conds, numbers, res, device):
    """Not in the paper: a walk from picture number A to number B (--between) -> model, new_noise.

    Picture i of 0 to n - 1 is at f = i / (n - 1). Its noise is cos(f pi / 2) a + sin(f pi / 2) b,
    of unit variance for independent a and b; its v_hat goes from that of A's condition to B's.
    """
    f = torch.tensor([i / (options.n - 1) for i in numbers], device=device)[:, None, None, None]
    noise_a, noise_b = (picture_noise(options.seed, [end], res, device) for end in options.between)
    cond_a, cond_b = (to_device(stacked([conds[end % len(conds)]] * len(numbers)), device)
                      for end in options.between)

    def mixed(z, logsnr, _):
        return ((1 - f) * guided(model, z, logsnr, cond_a, options.guidance)
                + f * guided(model, z, logsnr, cond_b, options.guidance))

    angle = f * math.pi / 2
    return mixed, lambda: torch.cos(angle) * noise_a() + torch.sin(angle) * noise_b()


def draw_batch(model, schedule, options, conds, numbers, res, device, folder, bar):
    """Draw the pictures with these numbers and write them; with --film, two films of picture 0."""
    # Compiled, all batches must be equally large: the last draws a few more, which are not written.
    size = min(options.batch, options.n) if options.compile else len(numbers)
    drawn = range(numbers[0], numbers[0] + size)
    cond = to_device(stacked([conds[i % len(conds)] for i in drawn]), device)
    new_noise, guidance = picture_noise(options.seed, drawn, res, device), options.guidance
    if options.between:
        (model, new_noise), guidance = walk(model, options, conds, drawn, res, device), 1
    steps = sampling_steps(model, schedule, new_noise, options.steps, cond, options.sampler,
                           options.gamma, guidance,
                           options.guidance_interval or (-math.inf, math.inf))
    film_steps, webp_steps = ({round(k * (options.steps - 1) / (frames - 1)) for k in range(frames)}
                              for frames in (9, 128))
    frames, moving = [], []                 # of the first picture: (z_t, x_hat); pixels of x_hat

    def pixels(x):                                          # portraits are rotated back
        return np.rot90(to_uint8(x), -1, (1, 2)) if options.portrait else to_uint8(x)

    for i, (z, x_hat) in enumerate(tqdm(steps, "sampling", options.steps, disable=not bar,
                                        leave=False)):      # the last x_hat: the pictures
        if options.film and 0 in numbers and i in film_steps:
            frames.append((z[:1].cpu(), x_hat[:1].cpu()))
        if options.film and 0 in numbers and i in webp_steps:
            moving.append(pixels(x_hat[:1])[0])
    if frames:
        zs, x_hats = zip(*frames)
        tiles = pixels(torch.cat([*zs, *x_hats]))           # z_t above, x_hat below
        folder.save("film.png", grid(list(tiles), len(frames)))
        folder.save_moving("film.webp", moving)
    for i, picture in zip(numbers, pixels(x_hat[:len(numbers)])):
        folder.save(f"{i:06d}.png", Image.fromarray(picture))


def draw_all(model, schedule, options, conds, res, ranks, folder):
    """Draw all pictures, batch k by rank k mod world: the same pictures on any number of ranks."""
    for start in range(options.batch * ranks.rank, options.n, options.batch * ranks.world):
        numbers = range(start, min(start + options.batch, options.n))
        if not folder.has(numbers):                 # skip what a stopped command has drawn
            with ranks.autocast(options.bf16):
                draw_batch(model, schedule, options, conds, numbers, res, ranks.device, folder,
                           bar=ranks.is_first)
    ranks.wait_and_leave_group()            # until all have drawn theirs
    if ranks.is_first:
        # A column per class or caption, if there are 2 to 12; else a square. At most ten rows.
        columns = len(conds) if 1 < len(conds) <= 12 else round(min(options.n, 100) ** .5)
        shown = range(min(options.n, 10 * columns))
        if options.between:                 # from end to end
            columns = min(options.n, 10)
            shown = np.linspace(0, options.n - 1, min(options.n, 100)).round().astype(int)
        shown = [folder.read(i) for i in shown]
        folder.save("grid.png", grid(shown, columns))
        if options.between:
            folder.save_moving("film.webp", shown)
        folder.save_npz()                   # for evaluators of FID


def main(argv=None):
    options = parse_sampling(argv)
    ckpt, why_chosen = options.ckpt, ""
    if not ckpt:
        ckpt, why_chosen = newest_model(with_text=bool(options.prompt))
    try:
        ranks = Ranks()
    except ValueError as error:
        fail(error, every_rank=True)            # printed by each rank that fails, not by 0 alone
    options.bf16 = ranks.has_bf16 if options.bf16 is None else options.bf16
    # On CPUs small batches are faster: glibc does not keep buffers over 32 MB for reuse.
    options.batch = options.batch or (4 if ranks.device.type == "cpu" else 16)
    try:
        model, saved = load_model(ckpt, ranks.device)       # the EMA weights, in eval mode
    except ValueError as error:
        fail(f"--ckpt {error}")
    if ranks.device.type == "cpu":
        model.to(memory_format=torch.channels_last)         # convolutions are faster so on CPUs
    if options.compile:
        trouble = compiler_trouble(ranks.device)
        if trouble:
            fail(f"--compile: {trouble}; the command works without this option", code=1)
        model.compile(mode="reduce-overhead", dynamic=False)
    if ranks.is_first and why_chosen:
        print(f"Model: {ckpt}, {why_chosen} (--ckpt FILE takes another).", flush=True)
    config = saved["config"]
    if options.guidance is None:
        chooses = len(saved["classes"]) > 1 or any(options.prompt or [])
        options.guidance = 3.0 if chooses and config["drop_label"] else 1.0
    conds = conditions(options, ckpt, config, saved["classes"])
    schedule = logsnr_schedule(options.schedule or config["schedule"], config["res"],
                               config["noise_d"])
    if options.spacing == "asinh":
        schedule = asinh_spacing(schedule, mean_side(config["res"]))
    folder = SampleFolder(options, config["res"], ckpt, ranks)
    try:
        folder.start_or_continue()
    except ValueError as error:
        fail(error)
    try:
        draw_all(model, schedule, options, conds, config["res"], ranks, folder)
    except torch.OutOfMemoryError as error:
        fail(f"--batch {options.batch}: {str(error).splitlines()[0]} A lower --batch takes less.",
             code=1, every_rank=True)
    except OSError as error:
        fail(f"--out {folder.out}: {error}; finished files are complete, and the same command "
             "continues", code=1, every_rank=True)
    if ranks.is_first:
        print(f"{options.n} pictures from {ckpt} (step {saved['step']}) in {folder.out}/: "
              "grid.png, 000000.png ..., samples.npz")


if __name__ == "__main__":
    sys.stdout, sys.stderr = IgnoreBrokenPipe(sys.stdout), IgnoreBrokenPipe(sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: the same command continues", 130)
