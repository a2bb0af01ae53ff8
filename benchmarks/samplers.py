"""Samplers of a trained network compared: petals, asymmetry, detail and distance by network calls.

    python benchmarks/samplers.py --n 60                        a first look, into samplers.md
    python benchmarks/samplers.py --n 500 --rows "dpm t 24" "ancestral0.2 t 128"
    python benchmarks/samplers.py --n 16 --rows "dpm karras7@-1.3 96" "dpm logsnr 18"
    python benchmarks/samplers.py --n 60 --petals 12 --rows "sde asinh 18" "sde t 18"

A row is a sampler (ancestral and its gamma, ddim, dpm, sde), a spacing of its times and the number
of network calls. All rows start from the same noise, so that those of ddim and dpm that begin at
the same logsnr would agree with enough calls; `off` is the root mean square of what a row differs
by from the first one, pictures being in [-1, 1]. Spacings, u going evenly from 1 to 0:

    t           t = u, as in the paper
    t^P         t = u^P: more steps where pictures are nearly clean
    logsnr      logsnr evenly from that of t = 1 to END
    karrasR     sigma / alpha to the power 1 / R evenly, to logsnr = END (Karras et al., 2022)
    karrasR@L   the same, beginning at logsnr = L of the mean of a picture
    asinh       as sample.py does
"""
import argparse
import math
import re
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent))
import score
from arguments import flowers_model
from data import stacked, to_uint8
from noise import picture_noise
from sample import asinh_spacing, sample
from schedule import logsnr_schedule, mean_side
from uvit import Condition

END = 9.0                           # logsnr at which a picture counts as clean: sigma = 0.011
ROWS = [f"{sampler} {spacing} {steps}" for steps in (12, 24) for sampler, spacing in (
    ("ancestral0", "t"), ("ancestral0.2", "t"), ("ddim", "t"), ("dpm", "t"), ("dpm", "t^1.5"),
    ("dpm", "t^2"), ("dpm", "logsnr"), ("dpm", "karras7"), ("dpm", "asinh"),
    ("sde", "asinh"), ("ancestral0.2", "t^2"))]


def spaced(schedule, spacing, d):
    """Schedule of u from 1 to 0 -> logsnr (B,), spaced as named."""
    if spacing[0] == "t":
        p = float(spacing[2:] or 1)
        return lambda u: schedule(u**p)
    if spacing == "logsnr":
        return lambda u: END + u * (schedule(torch.ones(1)) - END)
    if spacing == "asinh":
        return asinh_spacing(schedule, d)
    rho, _, first = spacing.removeprefix("karras").partition("@")
    logsnr_first = schedule(torch.ones(1)).clamp(min=float(first or -99) - 2 * math.log(d))
    high, low = (math.exp(-logsnr / 2 / float(rho)) for logsnr in (logsnr_first, END))
    return lambda u: -2 * float(rho) * torch.log(low + u * (high - low))


def draw(model, schedule, row, numbers, res, guidance, seed, petals):
    name, spacing, steps = row.split()
    sampler, gamma = re.fullmatch(r"([a-z]+)([\d.]*)", name).groups()
    cond = stacked([Condition(petals[i % len(petals)] - 3, 0, []) for i in numbers])
    return sample(model, spaced(schedule, spacing, mean_side(res)),
                  picture_noise(seed, numbers, res, "cpu"), int(steps), cond, sampler,
                  float(gamma or 0), guidance)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", default="assets/flowers.pt")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--n", type=int, default=60, help="flowers of a row (default: 60)")
    parser.add_argument("--petals", type=int, nargs="+", default=range(3, 13), metavar="N",
                        choices=range(3, 13),
                        help="numbers of petals, in turn (default: 3 to 12)")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", default="samplers.md", help="the table (default: samplers.md)")
    args = parser.parse_args()
    model, config = flowers_model(args.ckpt)
    schedule = logsnr_schedule(config["schedule"], config["res"], config["noise_d"])
    size = f"{config['res']}x{config['res']}"
    truth, _, _ = score.real(score.TRUTH, size, seed=7)
    out = open(args.out, "a")
    print("| sampler, spacing, calls | seconds | flowers | petals right | asymmetry | detail "
          "| distance | off |\n|-|-|-|-|-|-|-|-|", file=out, flush=True)
    of_first_row = None
    for row in args.rows:
        start, drawn = time.time(), []
        for first in range(0, args.n, 20):
            numbers = range(first, min(first + 20, args.n))
            x = draw(model, schedule, row, numbers, config["res"], args.guidance, args.seed,
                     args.petals)
            drawn.append(torch.from_numpy(to_uint8(x)).permute(0, 3, 1, 2) / 255)
        took, x = time.time() - start, torch.cat(drawn)
        of_first_row = x if of_first_row is None else of_first_row
        off = 2 * (x - of_first_row).square().mean().sqrt()
        found = score.score(x)
        petals = torch.tensor([args.petals[i % len(args.petals)] for i in range(args.n)])
        right = (found["petals"] == petals).double().mean()
        likeness = score.compare(x, truth)
        print(f"| {row} | {took:.0f} | {args.n} | {right:.1%} "
              f"| {found['asymmetry'].median():.3f} | {likeness['detail']:.2f} "
              f"| {likeness['distance']:.3f} | {off:.3f} |", file=out, flush=True)


if __name__ == "__main__":
    main()
