"""A race: ours and what else one could take, on the same pictures, for the same time on one core.

    pip install denoising-diffusion-pytorch diffusers einops            what it races against
    python benchmarks/race.py run ours flowers --seed 0 --minutes 20    into runs/race/
    python benchmarks/race.py run UViT flowers --lr 5e-4 --batch 8      one of the others
    python benchmarks/race.py score                                     what is not yet scored
    python benchmarks/race.py table                                     tables, and runs/race/*.webp

Racers, each with its own network, loss, optimizer and EMA:

    ours            `python train.py`: its network on a CPU, loss, optimizer, EMA
    UViT            denoising-diffusion-pytorch, simple_diffusion.py: UViT(dim=16), 2.4 M weights,
                    GaussianDiffusion by its defaults (cosine schedule, min-SNR weight);
                    Adam and EMA 0.995 every 10 steps as in the Trainer of that package
    UViT-eps        the same with the paper's loss and schedule: no min-SNR weight, noise_d=32
    UNet2D          diffusers, trained as its train_unconditional.py: DDPM's 1,000 times, eps,
                    AdamW, cosine decay after 500 steps, EMA; 32, 64, 96, 128 wide, 5.2 M weights
    UNet2D-large    the same with the network of that script, 114 M weights

Pictures are 64 x 64: `flowers` as train.py draws them, or a folder or zip of photographs, of which
the 10% whose name has a SHA-256 beginning with a number below 26 are held out. Only training is on
the clock. Scores are of the EMA, without class unless it is said:

    error       root mean square of x_hat - x at logsnr 6, 3, 0, -3, -6, of 64 new pictures
    distance    of benchmarks/score.py, of 100 pictures drawn by DPM-Solver++ in 16 steps without
                guidance to real ones (held-out ones); ours draws its classes in turn
    petals      share with the number of petals of their class, guidance 2 (ours, flowers)
"""
import argparse
import copy
import hashlib
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
from figures import COLOURS, plot, save
from flowers import Flowers
from noise import draw_noise, picture_noise
from sample import karras_spacing, sample
from schedule import alpha_sigma, logsnr_schedule
from train import ema_decay, learning_rate, loss_function, update_ema
from muon import Muon
from uvit import Condition

RES, MARKS, LEVELS = 64, (1, 2, 3, 5, 7, 10, 14, 20, 40, 80), (6, 3, 0, -3, -6)
FOLDER = Path("runs/race")


# ---------------------------------------------------------------------------- racers

class Ours:
    """`python train.py`; `done` is the share of the time that has passed."""

    def __init__(self, classes, lr=None, batch=None):
        options = [f"--{name}={value}" for name, value in (("lr", lr), ("batch", batch)) if value]
        self.config = config = parse_config(["--res", str(RES), "--model", "laptop", *options])
        self.batch, self.step, self.loss_fn = config.batch, 0, loss_function(config)
        self.model = build_network(**config.network_settings(classes))
        self.ema = copy.deepcopy(self.model).eval()
        adam = dict(lr=config.lr, betas=(0.9, 0.99), eps=1e-12, fused=True)
        self.optimizer = Muon(self.model, bf16=True, **adam) if config.optimizer == "muon" else \
            torch.optim.Adam(self.model.parameters(), **adam)

    def train(self, numbers, x, cond, done):
        self.config.steps = self.step / max(done, 1e-9) + 1     # as the time will allow
        self.optimizer.param_groups[0]["lr"] = learning_rate(self.step, self.config)
        t, eps, u = draw_noise(self.config.seed, numbers, RES, "cpu")
        loss = self.loss_fn(self.model, x, t, eps, cond=cond.dropped(u < self.config.drop_label))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        update_ema(self.ema, self.model, ema_decay(self.step, self.config.ema))
        self.step += 1
        return loss.item()

    def v_hat(self, z, logsnr, cond=None):
        return self.ema(z, logsnr, cond)


def their_module():
    """simple_diffusion.py of denoising-diffusion-pytorch alone: its package wants torchvision."""
    package = importlib.util.find_spec("denoising_diffusion_pytorch").origin
    file = Path(package).with_name("simple_diffusion.py")
    spec = importlib.util.spec_from_file_location("simple_diffusion", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TheirUViT:
    def __init__(self, classes, lr=None, batch=None, **diffusion):
        module = their_module()
        self.batch, self.step = batch or 16, 0
        self.model = module.UViT(dim=16)
        self.diffusion = module.GaussianDiffusion(self.model, image_size=RES, **diffusion)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr or 1e-4, betas=(0.9, 0.99))
        self.ema = copy.deepcopy(self.model).eval()

    def train(self, numbers, x, cond, done):
        loss = self.diffusion((x + 1) / 2)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.step % 10 == 0:
            update_ema(self.ema, self.model, 0.995 if self.step > 100 else 0)
        self.step += 1
        return loss.item()

    def v_hat(self, z, logsnr, cond=None):
        return self.ema(z, logsnr)


class TheirUNet:
    def __init__(self, classes, lr=None, batch=None, widths=(32, 64, 96, 128)):
        from diffusers import DDPMScheduler, UNet2DModel
        plain, self.batch, self.step, self.lr = len(widths) - 2, batch or 16, 0, lr or 1e-4
        self.model = UNet2DModel(
            sample_size=RES, in_channels=3, out_channels=3, layers_per_block=2,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * plain)
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.lr, betas=(0.95, 0.999),
                                           weight_decay=1e-6, eps=1e-8)
        self.ema = copy.deepcopy(self.model).eval()

    def train(self, numbers, x, cond, done):
        warmup = min(1, (self.step + 1) / 500)
        self.optimizer.param_groups[0]["lr"] = self.lr * warmup * (1 + math.cos(math.pi * done)) / 2
        eps = torch.randn_like(x)
        times = torch.randint(1000, (len(x),))
        z = self.scheduler.add_noise(x, eps, times)
        loss = F.mse_loss(self.model(z, times).sample.float(), eps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        update_ema(self.ema, self.model, min(0.9999, 1 - (1 + self.step) ** -0.75))
        return loss.item()

    def v_hat(self, z, logsnr, cond=None):
        """By the time between two of DDPM's at which logsnr is the one wanted."""
        known = torch.logit(self.scheduler.alphas_cumprod.double())     # falls with the time
        after = torch.searchsorted(-known, -logsnr.double()).clamp(1, len(known) - 1)
        share = (known[after - 1] - logsnr) / (known[after - 1] - known[after])
        times = (after - 1 + share.clamp(0, 1)).float()
        alpha, sigma = alpha_sigma(logsnr)
        eps_hat = self.ema(z, times).sample.float()
        return (eps_hat - sigma * z) / alpha                            # eps = sigma z + alpha v


RACERS = {
    "ours": Ours,
    "UViT": TheirUViT,
    "UViT-eps": lambda *a, **k: TheirUViT(*a, **k, min_snr_loss_weight=False, noise_d=32),
    "UNet2D": TheirUNet,
    "UNet2D-large": lambda *a, **k: TheirUNet(*a, **k, widths=(128, 128, 256, 256, 512, 512)),
}


# ---------------------------------------------------------------------------- pictures

def is_held_out(name):
    return hashlib.sha256(Path(name).stem.encode()).digest()[0] < 26


def pictures(source, seed, held_out=False):
    """A dataset of data.py, for training or held out."""
    if source == "flowers":
        return Flowers(RES, seed + 10**6 * held_out)
    dataset = Pictures(source, RES, seed, flip=not held_out)
    kept = [i for i, name in enumerate(dataset.names) if is_held_out(name) == held_out]
    dataset.names = [dataset.names[i] for i in kept]
    dataset.labels = [dataset.labels[i] for i in kept]
    return dataset


# ---------------------------------------------------------------------------- the commands

def run(args):
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    dataset = pictures(args.source, args.seed)
    racer = RACERS[args.racer](len(dataset.classes), lr=args.lr, batch=args.batch)
    name = "-".join([args.racer, Path(args.source).stem, str(args.seed)]
                    + [str(value) for value in (args.lr, args.batch, args.tag) if value])
    FOLDER.mkdir(parents=True, exist_ok=True)
    marks = [mark for mark in MARKS if mark < args.minutes] + [args.minutes]
    spent, shown, count, losses = 0.0, 0, 0, []
    while marks:
        start = time.perf_counter()
        numbers = range(count, count + racer.batch)
        x, cond, _ = collate([dataset[n] for n in numbers])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16 == "on"):
            losses.append(racer.train(numbers, from_uint8(x), cond, spent / (60 * args.minutes)))
        count += len(x)
        spent += time.perf_counter() - start
        if spent >= 60 * marks[0]:
            mark = marks.pop(0)
            torch.save(dict(racer=args.racer, source=args.source, seed=args.seed, lr=args.lr,
                            batch=args.batch, tag=args.tag, minutes=mark, of=args.minutes,
                            pictures=count, weights=racer.ema.state_dict()),
                       FOLDER / f"{name}-{mark:g}.pt")
        if spent >= shown:
            print(f"{name}: {spent / 60:.1f} minutes, {count} pictures, "
                  f"loss {sum(losses) / len(losses):.4f}", flush=True)
            shown, losses = shown + 60, []


@torch.no_grad()
def scores(file, n=100, steps=16):
    """A file of `run` -> dict of its scores."""
    saved = torch.load(file)
    new = pictures(saved["source"], saved["seed"], held_out=True)
    racer = RACERS[saved["racer"]](len(new.classes), lr=saved["lr"], batch=saved["batch"])
    racer.ema.load_state_dict(saved.pop("weights"))
    x = from_uint8(collate([new[i] for i in range(64)])[0])
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for level in LEVELS:
        logsnr = torch.full((len(x),), float(level))
        alpha, sigma = alpha_sigma(logsnr)
        z = alpha * x + sigma * eps
        v_hat = torch.cat([racer.v_hat(*part) for part in zip(z.split(64), logsnr.split(64))])
        errors.append((alpha * z - sigma * v_hat.float() - x).square().mean().sqrt().item())
    ours, flowers = saved["racer"] == "ours", saved["source"] == "flowers"
    schedule = karras_spacing(logsnr_schedule("shifted", RES))
    draw = lambda guidance: torch.cat([sample(
        racer.v_hat, schedule, picture_noise(saved["seed"], part.tolist(), RES, "cpu"), steps,
        Condition(part % len(new.classes)) if ours else None, "dpm", guidance=guidance)
        for part in torch.arange(n).split(50)]) / 2 + .5
    drawn = draw(1.0)
    real = score.real(500, RES, seed=7)[0] if flowers else \
        torch.stack([new[i][0] for i in range(len(new.names))]) / 255
    found = dict(saved, error=errors, **score.compare(drawn, real))
    if ours and flowers:
        petals = score.score(draw(2.0))["petals"]
        found["petals"] = (petals == torch.arange(n) % 10 + 3).float().mean().item()
    grid(list(to_uint8(drawn[:40] * 2 - 1)), 10).save(Path(file).with_suffix(".png"))
    return found


def score_all(args):
    torch.set_num_threads(args.threads)
    for file in sorted(FOLDER.glob("*.pt")):
        result = file.with_suffix(".json")
        if not result.exists():
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16 == "on"):
                found = scores(file)
            result.write_text(json.dumps(found))
            print(json.dumps(found), flush=True)


def table(args):
    found = [json.loads(file.read_text()) for file in FOLDER.glob("*.json")]
    for source in sorted({row["source"] for row in found}):
        rows = sorted((row for row in found if row["source"] == source),
                      key=lambda row: (row["racer"], row["lr"] or 0, row["batch"] or 0,
                                       row["seed"], row["minutes"]))
        print(f"\n| {Path(source).stem} | lr, batch | seed | minutes | pictures "
              "| error at logsnr 6, 3, 0, -3, -6 | distance | petals |\n|-|-|-|-|-|-|-|-|")
        curves = {}
        for row in rows:
            errors = " ".join(f"{error:.3f}"[1:] for error in row["error"])
            petals = f"{row['petals']:.1%}" if "petals" in row else ""
            print(f"| {row['racer']} {row['tag']} | {row['lr'] or ''} {row['batch'] or ''} "
                  f"| {row['seed']} | {row['minutes']:g} | {row['pictures']:,} | {errors} "
                  f"| {row['distance']:.3f} | {petals} |")
            if row["of"] == max(r["of"] for r in rows if r["racer"] == row["racer"]):
                curves.setdefault(f"{row['racer']}, seed {row['seed']}", []).append(row)
        last = max(row["minutes"] for row in rows)
        top = max(math.log2(row["distance"]) for row in rows)
        low = min(math.log2(row["distance"]) for row in rows)
        colours = dict(zip(dict.fromkeys(name.split(",")[0] for name in curves), COLOURS))
        lines = {name: ([row["minutes"] for row in part],
                        [math.log2(row["distance"]) for row in part],
                        colours[name.split(",")[0]]) for name, part in curves.items()}
        save(plot(lines, (720, 400), (0, last), (math.floor(low), math.ceil(top)),
                  "distance over minutes on one core", ticks=lambda y: f"{2**y:.2g}"),
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
    train.add_argument("--bf16", choices=("on", "off"), default="on")
    train.add_argument("--tag", default="", help="a word for the row of the table")
    train.set_defaults(command=run)
    scoring = commands.add_parser("score")
    scoring.add_argument("--threads", type=int, default=1)
    scoring.add_argument("--bf16", choices=("on", "off"), default="on")
    scoring.set_defaults(command=score_all)
    commands.add_parser("table").set_defaults(command=table)
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    main()
