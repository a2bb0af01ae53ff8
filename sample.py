"""Sampling (Appendix A): ancestral sampler, DDIM, guidance; `python sample.py` writes pictures.

From z at t = 1, unit noise, a uniform grid of t runs down to 0 in `steps` steps t -> s, s < t. Each
asks the network once for x_hat. The last step returns x_hat itself: N steps are N calls.
"""
import argparse
import difflib
import glob
import json
import math
import os
import re
import signal
import sys
import zipfile
import zlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from checkpoint import lock, read, write
from loss import x_from_v
from schedule import SCHEDULES, alpha_sigma, logsnr_schedule, sides
from text import condition, text_encoder, tokenizer, unconditional
from unet import UNet
from uvit import PRESETS, UViT


def ancestral_step(z, x_hat, logsnr_t, logsnr_s, gamma, noise):
    """Ancestral step t -> s (Appendix A): z_t, x_hat, noise: (B, C, H, W); logsnr: (B,) -> z_s.

    mu = alpha_s (z_t (1 - c) / alpha_t + c x_hat), c = 1 - SNR_t / SNR_s; the log variance lies
    between its two bounds, c sigma_t^2 (gamma = 1) and that of the posterior, c sigma_s^2 (0).
    """
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    c = -torch.expm1(logsnr_t - logsnr_s)[:, None, None, None]
    mu = alpha_s * (z * (1 - c) / alpha_t + c * x_hat)
    log_variance = gamma * torch.log(c * sigma_t**2) + (1 - gamma) * torch.log(c * sigma_s**2)
    return mu + torch.exp(log_variance / 2) * noise


def ddim_step(z, x_hat, logsnr_t, logsnr_s):
    """DDIM step t -> s (Song et al., 2021; for few steps): same x_hat and eps_hat, less noise."""
    alpha_t, sigma_t = alpha_sigma(logsnr_t)
    alpha_s, sigma_s = alpha_sigma(logsnr_s)
    return alpha_s * x_hat + sigma_s * (z - alpha_t * x_hat) / sigma_t


def guided(model, z, logsnr, label, guidance):
    """v_hat with guidance (Appendix A), in one call: (B, C, H, W), (B,), label -> (B, C, H, W).

    eps_hat = (1 + eta) eps_cond - eta eps_uncond, guidance = 1 + eta; at the same z, eps is affine
    in v, so the same combination of v gives it. guidance = 1 is the conditional model.
    """
    if guidance == 1:
        return model(z, logsnr, label).float()
    assert label is not None, f"guidance {guidance} needs labels; 1 is off"
    both = torch.cat([label, unconditional(label, model.classes)])
    v_hat = model(torch.cat([z, z]), torch.cat([logsnr, logsnr]), both).float()
    cond, uncond = v_hat.chunk(2)
    return guidance * cond + (1 - guidance) * uncond


@torch.no_grad()
def sample(model, logsnr, noise, steps, label=None, sampler="ancestral", gamma=0.2, guidance=1.0,
           interval=(-math.inf, math.inf), bar=False, watch=lambda i, z, x_hat: None):
    """Pictures (B, C, H, W) in [-1, 1] by exactly `steps` calls of model (Appendix A).

    model: (z, logsnr, label) -> v_hat;  logsnr: a schedule, t -> (B,);  noise: () -> fresh unit
    noise (B, C, H, W);  label: (B,) classes, (B, 2 + L) rows of `condition`, or None;  sampler:
    "ancestral" or "ddim";  gamma: 0 to 1;  interval: of logsnr, where there is guidance (SiD2);
    watch: is shown each step's number, z_t and x_hat.
    """
    z = noise()
    clock = logsnr(torch.linspace(1, 0, steps + 1))
    pairs = clock.to(z.device).unfold(0, 2, 1)          # (steps, 2): now, and what comes next
    for i in tqdm(range(steps), desc="sampling", disable=not bar, leave=False):
        logsnr_t, logsnr_s = pairs[i, :, None].expand(2, len(z))
        inside = interval[0] <= clock[i] <= interval[1]
        v_hat = guided(model, z, logsnr_t, label, guidance if inside else 1)
        x_hat = x_from_v(z, v_hat, *alpha_sigma(logsnr_t)).clamp(-1, 1)
        watch(i, z, x_hat)
        if i == steps - 1:
            return x_hat
        if sampler == "ddim":
            z = ddim_step(z, x_hat, logsnr_t, logsnr_s)
        else:
            z = ancestral_step(z, x_hat, logsnr_t, logsnr_s, gamma, noise())


# ---------------------------------------------------------------------------- seeds and pictures

# What a seed is for: the first number of its key, so that no two streams are ever the same.
TRAINING, SAMPLING, DROPOUT = 1, 2, 3


def seed_of(purpose, *key):
    """A mixed seed from whole numbers, e.g. (TRAINING, seed, picture); CPUs use 32 bits of it."""
    mixed = np.random.SeedSequence((purpose, *key)).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def picture_noise(seed, indices, res, device):
    """A `noise` for `sample`: picture i's depends on (seed, i) alone, whatever shares its batch."""
    generators = [torch.Generator(device).manual_seed(seed_of(SAMPLING, seed, i))
                  for i in indices]
    return lambda: torch.stack([torch.randn(3, *sides(res), generator=generator, device=device)
                                for generator in generators])


def to_uint8(x):
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8 numpy."""
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def grid(pictures, columns):
    """List of (H, W, 3) uint8 -> one PIL picture, row by row, white where the last row is short."""
    h, w, _ = pictures[0].shape
    rows = -(-len(pictures) // columns)
    sheet = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = i // columns * h, i % columns * w
        sheet[y:y + h, x:x + w] = picture
    return Image.fromarray(sheet)


# ---------------------------------------------------------------------------- command line, ranks

def fail(message, code=2, every_rank=False):
    """End with one line and no traceback. Code 2: the input is wrong; 1: the world around is."""
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":      # once a node
        print(" ".join(str(message).splitlines()), file=sys.stderr, flush=True)
    raise SystemExit(code)


class Steady:
    """stdout or stderr whose reader may leave, or whose disk may fill: the rest goes nowhere."""

    def __init__(self, file):
        self.file = file
        file.reconfigure(errors="backslashreplace")     # files may be named anything

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        return len(text)

    def flush(self):
        pass


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line: the argument, the value, what would be right."""

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        if message.startswith("unrecognized arguments"):
            word = (message.partition(": ")[2].split() or ["''"])[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 1)
            message = f"{word}: no such argument, {near[0] if near else '--help'} is one"
        fail(message)


def whole(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number")


def number(text):
    try:
        if math.isfinite(float(text)):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: must be a finite number")


def has_cuda():
    """Whether there is a GPU by CUDA or ROCm. DEVICE=cpu in the environment: it is left alone."""
    return torch.cuda.is_available() and os.environ.get("DEVICE") != "cpu"


def pick_device():
    """This rank's device, and whether its hardware has bf16."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if has_cuda():
        if local_rank >= torch.cuda.device_count():
            fail(f"rank {local_rank} has no GPU of its own: --nproc_per_node is at most "
                 f"{torch.cuda.device_count()} here", every_rank=True)
        torch.cuda.set_device(local_rank)
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.device("cuda", local_rank), has_bf16
    if torch.backends.mps.is_available() and not {"DEVICE", "RANK"} & os.environ.keys():
        return torch.device("mps"), False           # alone: gloo has no MPS
    return torch.device("cpu"), torch.cpu._is_avx512_bf16_supported()


def compiler_trouble(device):
    """Why torch.compile does not work here, in a line; None if it does."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(4, device=device))
    except Exception as error:              # of another kind on each platform
        return f"no compiler works here ({(str(error).splitlines() or [type(error).__name__])[0]})"


def network(config, classes):
    """The network that a configuration (a dict) names, for this many classes."""
    shape, dial = dict(PRESETS[config["model"]]), config["blocks_16"]
    same = dict(classes=classes, patch=config["patch"], dropout_res=config["dropout_res"],
                portrait=config["portrait"])
    if config["net"] == "unet":
        drop = config["dropout"] if config["dropout"] >= 0 else min(.1, shape["dropout"])
        return UNet(config["res"], shape["widths"][0], shape["head"], shape["emb"], drop, **same,
                    blocks_16=dial or 12)
    if config["dropout"] >= 0:
        shape["dropout"] = config["dropout"]
    text = text_encoder(config["text"], config["text_length"], shape["emb"] // 2)
    return UViT(config["res"], **shape | dict(depth=dial or shape["depth"]), **same, text=text,
                residual=config["skips"] == "level")


def load_model(path, device):
    """model.pt -> network with EMA weights, the dict they came in. Raises ValueError, one line."""
    saved = read(path)
    config = saved["config"]
    try:
        with torch.device("meta"):          # takes no memory, whatever the file asks for
            model = network(config, len(saved["classes"]))
        model.load_state_dict(saved["ema"], assign=True)
        some = logsnr_schedule(config["schedule"], config["res"], config["noise_d"])(torch.rand(2))
        assert some.isfinite().all() and all(isinstance(name, str) for name in saved["classes"])
        assert all(p.is_floating_point() and p.isfinite().all() for p in model.parameters())
    except Exception as error:
        if str(error).startswith("t5:"):
            raise
        raise ValueError(f"{path}: its weights are not those of the network it describes")
    return model.to(device, torch.float32).eval().requires_grad_(False), saved


def parse_args(argv):
    """argv -> what to draw. Wrong input: a line, exit code 2."""
    parser = Parser(description="Draw pictures with a trained model.", allow_abbrev=False)
    parser.add_argument("--ckpt", default="", help="model.pt of a run (default: the newest; where "
                        "there is no run, assets/flowers.pt, or with prompts assets/words.pt)")
    parser.add_argument("--out", default="", help="folder for the pictures (default: samples)")
    parser.add_argument("--n", type=whole, help="how many (default: 16, or one for each prompt)")
    parser.add_argument("--steps", type=whole, default=128, help="network calls per picture")
    parser.add_argument("--sampler", choices=["ancestral", "ddim"], default="ancestral")
    parser.add_argument("--gamma", type=number, default=0.2, help="variance, 0 to 1")
    parser.add_argument("--guidance", type=number, default=1.0, help="1 + eta; 1 is off")
    parser.add_argument("--guidance-interval", type=number, nargs=2, default=[-99, 99],
                        metavar=("LOW", "HIGH"), help="logsnr between which there is guidance")
    parser.add_argument("--schedule", choices=SCHEDULES, help="(default: that of the training)")
    parser.add_argument("--label", default="", help="a class: name, or number from 0")
    parser.add_argument("--prompt", nargs="+", help="captions, in turns")
    parser.add_argument("--prompts", metavar="FILE", help="file of more of them, a line each")
    parser.add_argument("--portrait", action="store_true", help="pictures that stand upright")
    parser.add_argument("--film", action="store_true",
                        help="also film.png: z_t and x_hat of the first picture from t = 1 to 0")
    parser.add_argument("--seed", type=whole, default=0)
    parser.add_argument("--batch", type=whole, default=16, help="pictures at a time")
    parser.add_argument("--compile", action="store_true",
                        help="compile the network, with CUDA graphs: a minute, for many pictures")
    args = parser.parse_args(argv)

    if args.prompts:
        try:
            lines = Path(args.prompts).read_text("utf-8-sig", "replace").splitlines()
        except OSError as error:
            fail(f"--prompts {args.prompts}: {error.strerror}")
        args.prompt = (args.prompt or []) + [line for line in lines if line.strip()]
        if not args.prompt:
            fail(f"--prompts {args.prompts}: holds no line")
    args.n = len(args.prompt or 16 * [""]) if args.n is None else args.n
    for name, least in dict(n=1, steps=1, batch=1, seed=0, guidance=0, gamma=0).items():
        if getattr(args, name) < least:
            fail(f"--{name} {getattr(args, name)}: must be at least {least}")
    low, high = args.guidance_interval
    if low > high:
        fail(f"--guidance-interval {low} {high}: the first must be the lower")
    if [low, high] != [-99, 99] and args.guidance == 1:
        fail(f"--guidance-interval {low} {high}: needs a --guidance other than 1")
    for name, most in dict(gamma=1, n=10_000_000, steps=100_000, batch=10_000, seed=2**63).items():
        if getattr(args, name) > most:
            fail(f"--{name} {getattr(args, name)}: must be at most {most}")
    return args


def conditions(args, ckpt, config, classes):
    """What is asked for, in turns -> rows of `condition`. What the model has not: a line."""
    if args.prompt and not config["text"]:
        fail(f"--prompt: needs a model with --text, and {ckpt} was trained without; "
             "--ckpt assets/words.pt has it")
    if args.portrait and not config["portrait"]:
        fail(f"--portrait: needs a model with --portrait, and {ckpt} was trained without")
    if not classes and args.label:
        fail(f"--label {args.label}: needs a model with classes, and {ckpt} was trained without")
    if not classes and not config["text"] and args.guidance != 1:
        fail(f"--guidance {args.guidance}: needs a model with classes or text, and {ckpt} was "
             "trained without")
    if args.label in classes:
        wanted = [classes.index(args.label)]
    elif args.label:
        if not args.label.isdecimal() or int(args.label) >= len(classes):
            fail(f"--label {args.label}: must be one of 0 to {len(classes) - 1}, or of "
                 f"{', '.join(classes)}, the classes of --ckpt {ckpt}")
        wanted = [int(args.label)]
    else:
        wanted = range(len(classes) or 1)
    wanted = [condition(label, args.portrait) for label in wanted]
    if config["text"]:
        try:
            tokens = tokenizer(config["text"], config["text_length"])
        except ValueError as error:
            fail(f"--ckpt {ckpt}: {error}")
        wanted = [condition(0, args.portrait, tokens(prompt)) for prompt in args.prompt or [""]]
    return wanted


def open_folder(out, settings, pictures, named):
    """Lock the folder, for rank 0. Pictures of the same settings stay, so that the same command
    goes on. Of other settings they are removed, or, in a folder that --out named, refused, as are
    numbered pictures without settings.json.

    -> settings.json (open: the lock lasts as long), and None or why the folder cannot be used.
    """
    held = None
    try:
        out.mkdir(parents=True, exist_ok=True)
        held = lock(out / "settings.json")
        text = (out / "settings.json").read_text()
        before = dict(guidance_interval=[-99, 99], portrait=False)      # of older settings.json
        was = before | json.loads(text) if text else {}
        strangers = not text and list(out.glob("[0-9]*.png"))
        differ = [f"--{name.replace('_', '-')} {was.get(name)}, now {value}"
                  for name, value in settings.items()
                  if was.get(name) != value]
        if strangers or text and differ and named:
            what = strangers[0].name if strangers else differ[0]
            if not text:
                (out / "settings.json").unlink()
            return held, f"--out {out}: holds other pictures ({what}): name another folder"
        if differ:
            olds = [*out.glob("[0-9]" * 6 + "*.png"), out / "samples.npz", out / "grid.png",
                    out / "film.png"]
            for old in olds:
                old.unlink(missing_ok=True)
            held.truncate(0)
            held.write(json.dumps(settings).encode())
        for name in ["samples.npz", "grid.png", "film.png", *pictures]:
            (out / f"{name}.part").unlink(missing_ok=True)      # of a command that was killed
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        return held, f"--out {out}: cannot be used ({error}): name another folder"
    return held, None


def main(argv=None):
    args = parse_args(argv)
    runs = list(filter(os.path.isfile, glob.glob("runs/*/model.pt")))
    released = Path(__file__).parent / "assets" / ("words.pt" if args.prompt else "flowers.pt")
    ckpt = args.ckpt or max(runs, key=os.path.getmtime, default=released)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, bf16 = pick_device()
    try:
        model, saved = load_model(ckpt, device)
    except ValueError as error:
        fail(f"--ckpt {error}")
    if args.compile:
        trouble = compiler_trouble(device)
        if trouble:
            fail(f"--compile: {trouble}; the same command without --compile does without", 1)
        model.compile(mode="reduce-overhead", dynamic=False)
    config, classes = saved["config"], saved["classes"]
    if rank == 0 and not args.ckpt:
        which = "the newest in runs/" if runs else "the bundled weights"
        print(f"Model: {ckpt}, {which} (--ckpt FILE takes another).", flush=True)
    schedule = args.schedule or config["schedule"]
    logsnr = logsnr_schedule(schedule, config["res"], config["noise_d"])

    wanted = conditions(args, ckpt, config, classes)

    # -- the folder: pictures of the same settings are kept, so that the same command goes on
    out, pictures = Path(args.out or "samples"), [f"{i:06d}.png" for i in range(args.n)]
    checksums = [info.CRC for info in zipfile.ZipFile(ckpt).infolist()]
    settings = vars(args) | dict(ckpt=f"{zlib.crc32(repr(checksums).encode()):08x}", out="",
                                 device=device.type, bf16=bf16)
    del settings["compile"], settings["film"]       # the same pictures, to rounding
    trouble = [None]                        # what rank 0 says to all
    if rank == 0:
        held, trouble[0] = open_folder(out, settings, pictures, args.out)
    if world > 1:
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        dist.broadcast_object_list(trouble)
    if trouble[0]:
        fail(trouble[0])

    shown = {round(k * (args.steps - 1) / 8) for k in range(9)}     # steps of the film

    # -- fixed batches, batch k by rank k mod world: the same pictures on any number of ranks
    def save_pictures(indices):
        shots = []                          # of the first picture: z_t, x_hat

        def watch(step, z, x_hat):
            if step in shown and args.film and 0 in indices:
                shots.append((z[:1].cpu(), x_hat[:1].cpu()))

        # Compiled code is for one size of batch: the last is filled up, which zip leaves out again.
        size = min(args.batch, args.n) if args.compile else len(indices)
        filled = range(indices[0], indices[0] + size)
        label = torch.stack([wanted[i % len(wanted)] for i in filled]).to(device)
        noise = picture_noise(args.seed, filled, config["res"], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            x = sample(model, logsnr, noise, args.steps, label, args.sampler, args.gamma,
                       args.guidance, args.guidance_interval, bar=rank == 0, watch=watch)
        if shots:
            tiles = to_uint8(torch.cat([shot[row] for row in (0, 1) for shot in shots]))
            sheet = grid(list(np.rot90(tiles, -args.portrait, (1, 2))), len(shots))
            write(out / "film.png", lambda file: sheet.save(file, "PNG"))
        for i, picture in zip(indices, np.rot90(to_uint8(x), -args.portrait, (1, 2))):
            write(out / pictures[i], lambda file: Image.fromarray(picture).save(file, "PNG"))

    def drawn(i):
        try:
            with Image.open(out / pictures[i]) as image:
                return image.size == sides(config["res"])[::1 if args.portrait else -1]
        except OSError:
            return False

    picture = lambda i: np.asarray(Image.open(out / pictures[i]))

    def save_npz(file):                     # arr_0 (N, H, W, 3) uint8, written picture by picture
        header = dict(descr="|u1", fortran_order=False, shape=(args.n, *picture(0).shape))
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                np.lib.format.write_array_header_1_0(array, header)
                for i in range(args.n):
                    array.write(picture(i).tobytes())

    try:
        for start in range(args.batch * rank, args.n, args.batch * world):
            indices = range(start, min(start + args.batch, args.n))
            unseen = args.film and start == 0 and not (out / "film.png").exists()
            if unseen or not all(drawn(i) for i in indices):
                save_pictures(indices)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
        if rank == 0:
            write(out / "samples.npz", save_npz)    # for FID evaluators
            square = max(1, round(min(args.n, 100) ** .5))
            columns = len(wanted) if 1 < len(wanted) <= 12 else square
            sheet = grid([picture(i) for i in range(min(args.n, 10 * columns))], columns)
            write(out / "grid.png", lambda file: sheet.save(file, "PNG"))
            print(f"{args.n} pictures from {ckpt} (step {saved['step']}) in {out}/: "
                  "grid.png, 000000.png ..., samples.npz")
            held.close()
    except torch.OutOfMemoryError as error:
        fail(f"--batch {args.batch}: {str(error).splitlines()[0]} A lower --batch takes less.", 1,
             every_rank=True)
    except OSError as error:
        fail(f"--out {out}: {error}; what is there is whole, and the same command goes on", 1,
             every_rank=True)


if __name__ == "__main__":
    sys.stdout, sys.stderr = Steady(sys.stdout), Steady(sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: the same command goes on from here", 130)
