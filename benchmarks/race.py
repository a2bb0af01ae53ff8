"""A race: ours and what else one could take, on the same pictures, for the same time on one core.

    pip install denoising-diffusion-pytorch diffusers einops            what it races against
    python benchmarks/race.py run ours flowers --seed 0 --minutes 20    into runs/race/
    python benchmarks/race.py run UViT flowers --lr 5e-4 --batch 8      one of the others
    python benchmarks/race.py score                                     what is not yet scored
    python benchmarks/race.py table                                     tables, and runs/race/*.webp

Racers, each with its own network, loss, optimizer and EMA:

    ours            `python train.py`: its network on a CPU, loss, optimizer, EMA, classes
    UViT            denoising-diffusion-pytorch, simple_diffusion.py: UViT(dim=16), 2.4 M weights,
                    GaussianDiffusion by its defaults (cosine schedule, min-SNR weight);
                    Adam and EMA as in the Trainer of that package
    UViT-eps        the same with the paper's loss and schedule: no min-SNR weight, noise_d=32
    UNet2D          diffusers, trained as its train_unconditional.py: DDPM's 1,000 times, eps,
                    AdamW, cosine decay, EMA; 32, 64, 96, 128 wide, 5.2 M weights, norms of 8
                    groups; the warm-up is the first 5% of the time in place of 500 steps
    UNet2D-large    the same with the network of that script, 114 M weights

Pictures are 64 x 64: `flowers` as train.py draws them, or a folder or zip of photographs, of which
the 10% whose name has a SHA-256 beginning with a byte below 26 are held out. Only training is on
the clock. Scores are of the EMA in float32:

    error       root mean square of x_hat - x at logsnr 6, 3, 0, -3, -6, of 64 held-out pictures,
                x_hat without class and clipped to [-1, 1]
    distance    of benchmarks/score.py, of 100 pictures drawn by DPM-Solver++ in 16 steps without
                guidance, to real ones (held-out photographs, other flowers); ours draws its classes
                in turn. The row `real` is that of 100 pictures of the training set. Photographs
                are compared by the features of a trained network; the head of score.py says which
    petals      share with the number of petals of their class, guidance 2 (ours, flowers)
"""
import argparse
import copy
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
import score
from checkpoint import build_network
from config import parse_config
from data import Pictures, collate, from_uint8, grid, to_uint8
from fid import is_held_out
from figures import COLOURS, plot, save
from flowers import Flowers
from listing import list_pictures
from muon import Muon
from noise import draw_noise, picture_noise
from sample import sample
from samplers import spaced
from schedule import alpha_sigma, logsnr_schedule
from train import ema_decay, learning_rate, loss_function, update_ema
from uvit import Condition

RES, MARKS, LEVELS = 64, (2, 5, 10, 20, 40, 80), (6, 3, 0, -3, -6)
FOLDER = Path("runs/race")
OTHERS = 10**6                      # added to a seed: flowers that no racer is trained on


def bf16(on):
    return torch.autocast("cpu", torch.bfloat16, enabled=on)


# ---------------------------------------------------------------------------- racers

class Ours:
    """`python train.py`. In `train`, done is the share of the time that has passed."""

    def __init__(self, classes, seed=0, lr=None, batch=None, in_bf16=True):
        options = [f"--{name}={value}" for name, value in (("lr", lr), ("batch", batch)) if value]
        self.config = config = parse_config(["--res", str(RES), "--model", "laptop", "--seed",
                                             str(seed), *options])
        self.batch, self.step, self.in_bf16 = config.batch, 0, in_bf16
        self.loss_fn = loss_function(config)
        self.model = build_network(**config.network_settings(classes))
        self.ema = copy.deepcopy(self.model).eval()
        adam = dict(lr=config.lr, betas=(0.9, 0.99), eps=1e-12, fused=True)
        self.optimizer = Muon(self.model, bf16=in_bf16, **adam) if config.optimizer == "muon" \
            else torch.optim.Adam(self.model.parameters(), **adam)

    def train(self, numbers, x, cond, done):
        self.config.steps = self.step / max(done, 1e-9) + 1     # as the time will allow
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.config)
        t, eps, u = draw_noise(self.config.seed, numbers, RES, "cpu")
        cond = cond.dropped(u < self.config.drop_label)
        with bf16(self.in_bf16):
            loss = self.loss_fn(self.model, x, t, eps, cond=cond)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, ema_decay(self.step, self.config.ema))
        self.step += 1
        return loss.item()

    def v_hat(self, z, logsnr, cond=None):
        return self.ema(z, logsnr, cond)


def simple_diffusion_of_the_other_package():
    """That file of denoising-diffusion-pytorch alone: the package itself wants torchvision."""
    package = importlib.util.find_spec("denoising_diffusion_pytorch").origin
    file = Path(package).with_name("simple_diffusion.py")
    spec = importlib.util.spec_from_file_location("simple_diffusion", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TheirUViT:
    def __init__(self, classes, seed=0, lr=None, batch=None, in_bf16=True, **diffusion):
        module = simple_diffusion_of_the_other_package()
        self.batch, self.step, self.in_bf16 = batch or 16, 0, in_bf16
        self.model = module.UViT(dim=16)
        self.diffusion = module.GaussianDiffusion(self.model, image_size=RES, **diffusion)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr or 1e-4, betas=(0.9, 0.99))
        self.ema = copy.deepcopy(self.model).eval()

    def train(self, numbers, x, cond, done):
        with bf16(self.in_bf16):
            loss = self.diffusion((x + 1) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.step % 10 == 0:         # as ema_pytorch.EMA(beta=0.995, update_every=10) does it
            since = self.step - 100
            update_ema(self.ema, self.model,
                       min(0.995, 1 - (1 + since) ** (-2 / 3)) if since > 0 else 0)
        self.step += 1
        return loss.item()

    def v_hat(self, z, logsnr, cond=None):
        return self.ema(z, logsnr)


class TheirUNet:
    def __init__(self, classes, seed=0, lr=None, batch=None, in_bf16=True,
                 widths=(32, 64, 96, 128), groups=8):
        from diffusers import DDPMScheduler, UNet2DModel
        plain, self.batch, self.step, self.lr = len(widths) - 2, batch or 16, 0, lr or 1e-4
        self.in_bf16 = in_bf16
        self.model = UNet2DModel(
            sample_size=RES, in_channels=3, out_channels=3, layers_per_block=2,
            block_out_channels=widths, norm_num_groups=groups,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * plain)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.lr, betas=(0.95, 0.999),
                                           weight_decay=1e-6, eps=1e-8)
        self.ema = copy.deepcopy(self.model).eval()

    def train(self, numbers, x, cond, done):
        cosine = (1 + math.cos(math.pi * max(0, done - 0.05) / 0.95)) / 2
        self.optimizer.param_groups[0]["lr"] = self.lr * min(1, (done + 1e-3) / 0.05) * cosine
        eps = torch.randn_like(x)
        times = torch.randint(1000, (len(x),))
        z = self.scheduler.add_noise(x, eps, times)
        with bf16(self.in_bf16):
            eps_hat = self.model(z, times).sample
        loss = F.mse_loss(eps_hat.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        update_ema(self.ema, self.model, min(0.9999, 1 - self.step ** -0.75))
        return loss.item()

    def v_hat(self, z, logsnr, cond=None):
        """By the time between two of DDPM's at which logsnr is the one wanted."""
        known = torch.logit(self.scheduler.alphas_cumprod.double())     # falls with the time
        after = torch.searchsorted(-known, -logsnr.double()).clamp(1, len(known) - 1)
        share = (known[after - 1] - logsnr) / (known[after - 1] - known[after])
        times = (after - 1 + share.clamp(0, 1)).float()
        alpha, sigma = alpha_sigma(logsnr)
        return (self.ema(z, times).sample - sigma * z) / alpha          # eps = sigma z + alpha v


RACERS = {
    "ours": Ours,
    "UViT": TheirUViT,
    "UViT-eps": lambda *a, **k: TheirUViT(*a, **k, min_snr_loss_weight=False, noise_d=32),
    "UNet2D": TheirUNet,
    "UNet2D-large": lambda *a, **k: TheirUNet(*a, **k, groups=32,
                                              widths=(128, 128, 256, 256, 512, 512)),
}


# ---------------------------------------------------------------------------- pictures

def pictures(source, seed, held_out=False):
    """A dataset of data.py, for training or held out."""
    if source == "flowers":
        return Flowers(RES, seed + OTHERS * held_out)
    listing = list_pictures(source)
    kept = [i for i, name in enumerate(listing.names) if is_held_out(name) == held_out]
    assert kept, f"{source}: no picture {'held out' if held_out else 'left to train on'}"
    return Pictures(source, RES, seed, flip=not held_out, listing=listing.only(kept))


def unit(dataset, numbers):
    """Pictures of a dataset (B, 3, H, W) in [0, 1]."""
    return torch.stack([dataset[n][0] for n in numbers]) / 255


# ---------------------------------------------------------------------------- the commands

def run(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dataset = pictures(args.source, args.seed)
    racer = RACERS[args.racer](len(dataset.classes), args.seed, args.lr, args.batch,
                               args.bf16 == "on")
    settings = {name: getattr(args, name) for name in
                ("racer", "source", "seed", "lr", "batch", "bf16")} | dict(of=args.minutes)
    name = f"{args.racer}-{Path(args.source).stem}-{args.seed}-of-{args.minutes:g}" + "".join(
        f"-{part}" for part in (args.lr, args.batch, args.bf16) if part)
    FOLDER.mkdir(parents=True, exist_ok=True)
    marks = [mark for mark in MARKS if mark < args.minutes] + [args.minutes]
    spent, next_line, count, losses = 0.0, 0, 0, []
    while marks:
        start = time.perf_counter()
        numbers = range(count, count + racer.batch)
        x, cond, _ = collate([dataset[n] for n in numbers])
        losses.append(racer.train(numbers, from_uint8(x), cond, spent / (60 * args.minutes)))
        count += len(x)
        spent += time.perf_counter() - start
        if spent >= 60 * marks[0]:
            mark = marks.pop(0)
            file = FOLDER / f"{name}-{mark:g}.pt"
            file.with_suffix(".json").unlink(missing_ok=True)           # the score of an older one
            torch.save(settings | dict(minutes=mark, pictures=count,
                                       weights=racer.ema.state_dict()), file)
        if spent >= next_line:
            print(f"{name}: {spent / 60:.1f} minutes, {count} pictures, "
                  f"loss {sum(losses) / len(losses):.4f}", flush=True)
            next_line, losses = next_line + 60, []


@torch.no_grad()
def scores(file, n=100, steps=16):
    """A file of `run` -> dict of its scores; n samples."""
    saved = torch.load(file)
    held_out = pictures(saved["source"], saved["seed"], held_out=True)
    classes, flowers = len(held_out.classes), saved["source"] == "flowers"
    racer = RACERS[saved["racer"]](classes, lr=saved["lr"], batch=saved["batch"])
    racer.ema.load_state_dict(saved.pop("weights"))
    x = unit(held_out, range(64)) * 2 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for level in LEVELS:
        logsnr = torch.full((len(x),), float(level))
        alpha, sigma = alpha_sigma(logsnr)
        z = alpha * x + sigma * eps
        x_hat = (alpha * z - sigma * racer.v_hat(z, logsnr)).clamp(-1, 1)
        errors.append((x_hat - x).square().mean().sqrt().item())
    schedule = spaced(logsnr_schedule("shifted", RES), "karras7@-1.3", RES)

    def draw(guidance):
        parts = []
        for part in torch.arange(n).split(50):
            cond = Condition(part % classes) if classes and saved["racer"] == "ours" else None
            noise = picture_noise(saved["seed"], part.tolist(), RES, "cpu")
            parts.append(sample(racer.v_hat, schedule, noise, steps, cond, "dpm",
                                guidance=guidance))
        return torch.cat(parts) / 2 + .5

    drawn = draw(1.0)
    grid(list(to_uint8(drawn[:40] * 2 - 1)), 10).save(Path(file).with_suffix(".png"))
    others = Flowers(RES, 2 * OTHERS) if flowers else held_out
    truth = unit(others, range(500 if flowers else len(held_out.names)))
    found = saved | dict(error=errors, **score.compare(drawn, truth, trained=not flowers))
    if flowers and saved["racer"] == "ours":
        petals = score.score(draw(2.0))["petals"]
        found["petals"] = (petals == torch.arange(n) % 10 + 3).float().mean().item()
    train = unit(pictures(saved["source"], saved["seed"]), range(n))
    found["real"] = score.compare(train, truth, trained=not flowers)["distance"]
    return found


def score_all(args):
    for file in sorted(FOLDER.glob(f"{args.only}*.pt")):
        result = file.with_suffix(".json")
        if not result.exists():
            found = scores(file)
            result.write_text(json.dumps(found))
            print(json.dumps(found), flush=True)


def table(args):
    found = [json.loads(file.read_text()) for file in FOLDER.glob("*.json")]
    for source in sorted({row["source"] for row in found}):
        rows = [row for row in found if row["source"] == source]
        rows.sort(key=lambda row: (row["racer"], row["lr"] or 0, row["batch"] or 0, row["bf16"],
                                   row["seed"], row["of"], row["minutes"]))
        print(f"\n| {Path(source).stem} | lr, batch, bf16 | seed | minutes | pictures "
              "| error at logsnr 6, 3, 0, -3, -6 | distance | petals |\n|-|-|-|-|-|-|-|-|")
        curves, longest = {}, {}
        for row in rows:
            longest[row["racer"]] = max(row["of"], longest.get(row["racer"], 0))
        for row in rows:
            errors = " ".join(f"{error:.3f}".removeprefix("0") for error in row["error"])
            petals = f"{row['petals']:.0%}" if "petals" in row else ""
            setting = " ".join(str(row[name]) for name in ("lr", "batch", "bf16") if row[name])
            print(f"| {row['racer']} | {setting} | {row['seed']} "
                  f"| {row['minutes']:g} of {row['of']:g} | {row['pictures']:,} | {errors} "
                  f"| {row['distance']:.3f} | {petals} |")
            if row["of"] == longest[row["racer"]]:
                name = f"{row['racer']}, seed {row['seed']}"
                curves.setdefault(name, []).append((row["minutes"], row["distance"]))
        real = sum(row["real"] for row in rows) / len(rows)
        print(f"| real | | | | | | {real:.3f} | |")
        last = max(minutes for curve in curves.values() for minutes, _ in curve)
        colours = dict(zip(dict.fromkeys(name.split(",")[0] for name in curves), COLOURS))
        lines = {name: (*zip(*((minutes, math.log2(distance)) for minutes, distance in curve)),
                        colours[name.split(",")[0]]) for name, curve in curves.items()}
        lines["other real pictures"] = (0, last), (math.log2(real),) * 2, "#999999"
        heights = [y for _, ys, _ in lines.values() for y in ys]
        save(plot(lines, (720, 400), (0, last),
                  (math.floor(min(heights)), math.ceil(max(heights))),
                  "distance over minutes on one core, log scale", ticks=lambda y: f"{2**y:.2g}"),
             FOLDER / f"{Path(source).stem}.webp")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("run")
    train.add_argument("racer", choices=RACERS)
    train.add_argument("source", help="flowers, or a folder or zip of photographs")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--minutes", type=float, default=20)
    train.add_argument("--lr", type=float, help="default: the racer's own")
    train.add_argument("--batch", type=int, help="default: the racer's own, 16")
    train.add_argument("--bf16", choices=("on", "off"), help="default: where the CPU has it",
                       default="on" if torch.cpu._is_avx512_bf16_supported() else "off")
    train.set_defaults(command=run)
    scoring = commands.add_parser("score")
    scoring.add_argument("only", nargs="?", default="", help="files that begin like this")
    scoring.set_defaults(command=score_all)
    commands.add_parser("table").set_defaults(command=table)
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    main()
