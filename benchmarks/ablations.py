"""The paper's findings, measured on flowers.

Each row of a finding is trained for the same steps, on the same pictures and noise, with each of
several seeds. Its samples and its errors are scored.

    python benchmarks/ablations.py --finding schedule               on two CPU cores
    python benchmarks/ablations.py --finding schedule --sizes 64 128 256 512 --model small

A command that was stopped continues where it was. It writes a table into docs/results.md and
pictures into benchmarks/, named like the table. Sizes default to multiples of 9, whose transformer
is at 9 x 9: a step of `tiny` at 72 and 144 takes a CPU 0.47 and 0.33 of one at 64 and 128.

Structure is what is left after averaging to 32 x 32 or the next size above that halves evenly. It
is scored apart: after 1,500 steps at 144 samples of `tiny` are still covered with grain. All levels
of the network are at least as wide as the wavelet has channels (48 at 288, 192 at 576), the top
one at least twice as wide, up to 128.

    structure, full     rms error of x_hat (clipped, as the sampler does) for flowers not trained
                        on, at five noise levels, after averaging (where its logsnr is -4, -2, 0,
                        2, 4), and before
    seen                structure for flowers of the 256 that were trained on (dropout)
    petals, asymmetry, distance     benchmarks/score.py, of averaged samples by class without
                        guidance
    detail              the same, of samples as they are
    speed               pictures/s of 40 steps, loading included, over those of the first row; all
                        rows in turns, three rounds, each time that the command ends (patch, blocks)
"""
import json
import math
import os
import re
import sys
import tempfile
import textwrap
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT)]
import checkpoint
import run
import score
import train
import uvit
from checkpoint import build_network, load_model, write
from cli import Parser, fail
from data import Pictures, collate, from_uint8, grid, to_uint8
from flowers import Flowers, draw_flower
from loss import x_from_v
from noise import picture_noise
from ranks import pick_device
from sample import sampling_steps
from schedule import alpha_sigma, logsnr_schedule
from uvit import Condition

PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "benchmarks"      # tables, pictures
LANCZOS = Image.Resampling.LANCZOS
LEVELS = -4., -2., 0., 2., 4.               # logsnr of the averaged picture
METRICS = dict(structure="{:.4f}", full="{:.4f}", seen="{:.4f}", asymmetry="{:.3f}",
               petals="{:.1%}", distance="{:.3f}", detail="{:.2f}", flops="{:.2f}",
               speed="{:.2f}")
ONLY = dict(seen=("dropout",), flops=("patch", "blocks"), speed=("patch", "blocks"))
UNITS = dict(structure="structure, rms", full="full, rms", seen="seen, rms", petals="petals right",
             flops="GFLOPs a picture, forward", speed="speed of training, first row 1")
COMPARED = "structure", "full", "asymmetry", "distance", "detail"
T_LIMITS = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262    # 5%, 2 to 10 seeds


# ---------------------------------------------------------------------------- findings

class EpsUViT(uvit.UViT):
    """The same network, whose output is eps_hat: v = (eps - sigma z_t) / alpha."""

    def forward(self, z, logsnr, cond=None):
        alpha, sigma = alpha_sigma(logsnr)
        return (super().forward(z, logsnr, cond) - sigma * z) / alpha


def predict_eps():
    checkpoint.UViT = EpsUViT


def train_on_elbo():
    """Train with logsnr, not t, uniform between the schedule's ends. The plain error of eps then is
    the variational bound, to a factor, since its weight -1/2 dlogsnr/dt is the same everywhere.
    Samples are drawn with the schedule itself.
    """
    def linear(name, res, noise_d):
        clean, noisy = logsnr_schedule(name, res, noise_d)(torch.tensor([0., 1.])).tolist()
        return lambda t: clean + t * (noisy - clean)
    train.logsnr_schedule = linear


class NoBar(run.tqdm):
    """No progress bar: those of several processes would overwrite each other."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options | dict(disable=True))


def widen(bands):
    """Make every level of every preset at least this wide."""
    for preset in uvit.PRESETS.values():
        network = preset["network"]
        network["widths"] = tuple(max(width, bands) for width in network["widths"])


def few_pictures(folder, res):
    """256 flowers, a folder for each class, to train on repeatedly -> folder."""
    for i in range(256):
        file = folder / f"{3 + i % 10:02d} petals" / f"{i:03d}.png"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            picture, _ = draw_flower(np.random.default_rng((11, i)), 3 + i % 10, res)
            image = Image.fromarray((picture * 255).round().astype(np.uint8))
            write(file, lambda out: image.save(out, "png"))
    return folder


class Finding(NamedTuple):
    says: str           # what the paper finds
    sizes: tuple
    rows: dict          # name: (flags, change); the first is what the others are compared with
    note: str = ""


# In flags, {half} and {quarter} are those of the pictures' side.
FINDINGS = dict(
    schedule=Finding(
        "Shifted beats cosine at 128 and above, more at 256 (Section 3.1).", (72, 144, 288),
        {"cosine": ("--schedule cosine", None),
         "shifted, 64": ("--set noise_d=64", None),
         "shifted, 32": ("--set noise_d=32", None),
         "interpolated": ("--schedule interpolated", None)}),
    multiscale=Finding(
        "The multiscale loss helps at 512; at 256 it does not (Section 3.2).", (288,),
        {"off": ("--set multiscale=off", None), "on": ("--set multiscale=on", None)}),
    dropout=Finding(
        "Dropout helps, most from 64 down and nearly as much from 16 down (Section 3.4). Here on "
        "256 pictures.", (72,),
        {"none": ("--set dropout=0", None),
         "everywhere": ("--set dropout=0.2 dropout_res=72", None),
         "from 36": ("--set dropout=0.2 dropout_res=36", None),
         "transformer": ("--set dropout=0.2", None)}),
    blocks=Finding(
        "More blocks at 16 x 16 are better (Section 3.3).", (72,),
        {f"{n}": (f"--set blocks_16={n}", None) for n in (1, 2, 4, 8)}),
    patch=Finding(
        "The wavelet is better than no patching and faster; a convolution is not as good as the "
        "wavelet of its stride (Section 3.3).", (144,),
        {"none": ("--set patch=none", None),
         "DWT-1": ("--set blocks_16=6 largest_map={half}", None),
         "DWT-2": ("--set blocks_16=8 largest_map={quarter}", None),
         "conv 2 x 2": ("--set patch=conv blocks_16=6 largest_map={half}", None),
         "conv 4 x 4": ("--set patch=conv blocks_16=8 largest_map={quarter}", None)},
        " The blocks that a smaller top level saves move into the transformer. Levels are 16, 16, "
        "16, 48 wide without patching, 24, 16, 48 with one halving, 96, 48 with two."),
    prediction=Finding(
        "The network predicts v, and the loss of eps has weight 1 (Section 2, no figures in the "
        "paper).", (72,),
        {"v, loss of eps": ("", None), "v, loss of v": ("--loss v", None),
         "v, ELBO": ("", train_on_elbo), "eps, loss of eps": ("", predict_eps)}))


# ---------------------------------------------------------------------------- one row, one seed

def halvings(res):
    return max(0, int(math.log2(res / 32)))


def structure(x):
    """Pictures (N, 3, d, d) averaged by 2, 4, ..., to a side of 32 or more, but below 64."""
    return F.avg_pool2d(x, 2 ** halvings(x.shape[-1]))


def validate(model, res, count=64, device="cpu", pictures=None):
    """-> rms error of x_hat (2, levels): averaged, and as it is. pictures: default new flowers."""
    pictures = pictures or Flowers(res, seed=1_000_003)
    x, cond, _ = collate([pictures[n] for n in range(count)])
    x = from_uint8(x)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    errors = []
    with torch.no_grad():
        for level in LEVELS:
            logsnr = torch.full((count,), level - 2 * math.log(2**halvings(res)))       # Eq. 4
            alpha, sigma = alpha_sigma(logsnr)
            z = alpha * x + sigma * eps
            v = torch.cat([model(z[i:i + 16].to(device), logsnr[i:i + 16].to(device),
                                 Condition(cond.label[i:i + 16].to(device))).cpu()
                           for i in range(0, count, 16)])
            error = x_from_v(z, v, alpha, sigma).clamp(-1, 1) - x
            errors.append([structure(error).square().mean().sqrt().item(),
                           error.square().mean().sqrt().item()])
    return torch.tensor(errors).T.tolist()


def scored(x, res):
    """Pictures -> the scores of score.py, of their structure, and the detail of themselves."""
    truth, _, _ = score.real(500, res, seed=1_000_005)
    return (score.score(structure(x)) | score.compare(structure(x), structure(truth))
            | dict(detail=score.detail(x, truth)))


def fit(finding, res, name, seed, args, steps, out):
    """Train one row, in a process of its own -> the folder of its few pictures, or None."""
    flags, change = FINDINGS[finding].rows[name]
    flags = flags.format(half=res // 2, quarter=res // 4)
    if change:
        change()
    run.tqdm = NoBar
    out.parent.mkdir(parents=True, exist_ok=True)
    few = args.out / f"few-{res}" if finding == "dropout" else None
    data = ["--data", str(few), "--no-flip"] if few else []
    argv = ["--set", "warmup=100", "multiscale=off", *flags.split(), *data, "--res", str(res),
            "--accum", "1", "--model", args.model, "--batch", str(args.batch), "--lr", str(args.lr),
            "--steps", str(steps), "--seed", str(seed), "--out", str(out), "--sample-every", "0"]
    config = train.parse_config(argv)
    widen(3 * 4**uvit.patch_levels(config.res, config.largest_map))
    train.main(argv)
    return few


def pace(finding, res, name, args):
    """Pictures/s of one row in steps 21 to 60 of its training, on all cores: mean of two halves."""
    torch.set_num_threads(os.cpu_count() or 1)
    run.FIRST_REPORT = 0                    # no checkpoint among the steps that are timed
    with tempfile.TemporaryDirectory() as out:
        fit(finding, res, name, 0, args, 60, Path(out))
        lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line["images_per_second"] for line in lines
             if "images_per_second" in line}
    if 60 not in found:                     # it was stopped
        raise KeyboardInterrupt
    return (found[40] + found[60]) / 2


def draw(model, config, seed, args):
    """-> args.samples pictures (N, 3, H, W) in [-1, 1], and x_hat of the first one at each step."""
    device, bf16 = pick_device()
    schedule = logsnr_schedule(config["schedule"], config["res"], config["noise_d"])
    drawn, of_first = [], []
    for start in range(0, args.samples, 40):
        numbers = range(start, min(start + 40, args.samples))
        cond = Condition(torch.tensor([i % 10 for i in numbers], device=device))
        noise = picture_noise(seed, numbers, config["res"], device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            for _, x_hat in sampling_steps(model, schedule, noise, args.sample_steps, cond):
                if start == 0:
                    of_first.append(x_hat[:1].clone())
        drawn.append(x_hat)
    return torch.cat(drawn).cpu(), of_first


def cell(finding, res, name, seed, args):
    """Train, sample and score one row with one seed, in a process of its own -> its folder."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    out = folder(finding, res, name, seed, args)
    settings = dict(samples=args.samples, sample_steps=args.sample_steps, score=6,
                    flags=FINDINGS[finding].rows[name][0])
    try:
        if json.loads((out / "scores.json").read_text())["settings"] == settings:
            return out
    except OSError:
        pass
    few = fit(finding, res, name, seed, args, args.steps, out)
    device, _ = pick_device()
    model, saved = load_model(out / "model.pt", device)
    if saved["step"] < args.steps:          # stopped: saved, but not done
        raise KeyboardInterrupt
    config = saved["config"]
    x, of_first = draw(model, config, seed, args)
    pictures, x = to_uint8(x), (x + 1) / 2
    grid(list(pictures[:40]), 10).save(out / "samples.png")
    times = [round((1 - t) * args.sample_steps) for t in (.8, .5, .2)]
    decided = [to_uint8(of_first[step])[0] for step in times]
    np.save(out / "decided.npy", np.stack([*decided, pictures[0]]))
    found = scored(x, res)
    errors = validate(model, config["res"], device=device)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):   # knows all attention
        build_network(**saved["network"])(torch.empty(1, 3, res, res), torch.empty(1))
    right = found["petals"] == torch.arange(len(x)) % 10 + 3
    scores = dict(settings=settings, errors=errors,
                  structure=np.mean(errors[0]), full=np.mean(errors[1]),
                  flops=counter.get_total_flops() / 1e9,
                  asymmetry=found["asymmetry"].median().item(), petals=right.float().mean().item(),
                  distance=found["distance"], detail=found["detail"])
    if few:
        seen = validate(model, res, device=device, pictures=Pictures(few, res, flip=False))
        scores["seen"] = np.mean(seen[0])
    write(out / "scores.json", lambda file: file.write(json.dumps(scores).encode()))
    return out


def paces(finding, sizes, rows, args, rounds=3):
    """{(res, name): [speed of training over that of the first row, one per round]}."""
    turns = [(finding, res, name, args) for _ in range(rounds) for res in sizes for name in rows]
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        found = np.reshape(list(pool.map(pace, *zip(*turns))), (rounds, len(sizes), len(rows)))
    ratios = found / found[:, :, :1]
    return {(res, name): ratios[:, i, j].tolist()
            for i, res in enumerate(sizes) for j, name in enumerate(rows)}


def folder(finding, res, name, seed, args):
    slug = re.sub(r"\W+", "-", name)
    return args.out / f"{finding}-{args.model}-{res}-{slug}-{args.steps}x{args.batch}-{seed}"


# ---------------------------------------------------------------------------- table and picture

def title(finding, sizes, rows, args):
    """The name of a table and its pictures; a command with another title leaves them alone."""
    some = [] if rows == list(FINDINGS[finding].rows) else rows
    return "; ".join([f"{finding} {args.model}", " ".join(map(str, sizes)), *some,
                      f"{args.steps}x{args.batch}", f"{args.seeds} seeds"])


def gaps_and_rises(values, sizes, first, others):
    """{(size, row): values, one per seed} -> {(size, row): first less the row, seed by seed}, and
    {("small to large", row): that at the larger size less that at the smaller}.
    """
    gaps = {(res, name): values[res, first] - values[res, name] for res in sizes for name in others}
    rises = {(f"{small} to {large}", name): gaps[large, name] - gaps[small, name]
             for i, large in enumerate(sizes) for small in sizes[:i] for name in others}
    return gaps | rises


def caption(finding, args):
    seeds = f"seeds 0 to {args.seeds - 1}" if args.seeds > 1 else "seed 0"
    samples = "" if (args.samples, args.sample_steps) == (200, 64) else \
        f" {args.samples} samples, {args.sample_steps} steps each."
    says = f"*{FINDINGS[finding].says}*"
    settings = (f"`{args.model}`, {args.steps:,} steps of {args.batch} pictures, learning rate "
                f"{args.lr:g}, {seeds}.{samples}{FINDINGS[finding].note}")
    return "\n".join(textwrap.fill(part, 118) for part in (says, settings))


def score_table(finding, sizes, rows, args, scores, speeds):
    metrics = [m for m in METRICS if finding in ONLY.get(m, FINDINGS)]
    lines = [f"| size | row | {' | '.join(UNITS.get(m, m) for m in metrics)} |",
             "|-" * (2 + len(metrics)) + "|"]
    for res in sizes:
        for name in rows:
            values = {m: speeds[res, name] if m == "speed" else [s[m] for s in scores[res, name]]
                      for m in metrics}
            cells = [METRICS[m].format(np.mean(v)) + " ± " + METRICS[m].format(np.std(v, ddof=1))
                     if len(v) > 1 else METRICS[m].format(v[0]) for m, v in values.items()]
            lines.append(f"| {res} | {name} | {' | '.join(cells)} |")
        x, petals, _ = score.real(args.samples, res, seed=1_000_007)
        found = scored(x, res)
        true = dict(petals=(found["petals"] == petals).float().mean().item(),
                    asymmetry=found["asymmetry"].median().item(), distance=found["distance"],
                    detail=found["detail"])
        cells = [METRICS[m].format(true[m]) if m in true else "" for m in metrics]
        lines.append(f"| {res} | real flowers | {' | '.join(cells)} |")
    return "\n".join(lines)


def gap_table(sizes, first, others, args, scores):
    """Scores of the first row less those of each other row, seed by seed."""
    head = f"Gaps: {first} less the row."
    if 2 <= args.seeds <= 10:               # 5%, t test
        limit = T_LIMITS[args.seeds - 2] / args.seeds**.5
        head = (f"Gaps: {first} less the row; significant from {limit:.2f} standard deviations on.")
    if len(sizes) > 1:
        small, large = sizes[:2]
        head += f' "{small} to {large}" is the gap at {large} less that at {small}.'
    lines = [textwrap.fill(head, 118), "", f"| size | row | {' | '.join(COMPARED)} |",
             "|-" * (2 + len(COMPARED)) + "|"]
    values = {key: np.array([[s[m] for m in COMPARED] for s in found])
              for key, found in scores.items()}
    for (where, name), found in gaps_and_rises(values, sizes, first, others).items():
        cells = [f"{g.mean():+.4f}" + (f" ± {g.std(ddof=1):.4f}" if len(g) > 1 else "")
                 for g in found.T]
        lines.append(f"| {where} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def error_table(sizes, first, others, args, scores):
    """The rms error of x_hat by noise level, and its gaps."""
    lines = ["Rms error of x_hat, averaged and (as it is), by the logsnr of the averaged picture:",
             "", f"| size | row | {' | '.join(f'{level:g}' for level in LEVELS)} |",
             "|-" * 7 + "|"]
    errors = {key: np.array([s["errors"] for s in found]) for key, found in scores.items()}
    gaps = gaps_and_rises(errors, sizes, first, others)
    for (res, name), found in errors.items():
        small, full = found.mean(0)
        cells = [f"{a:.3f} ({b:.3f})" for a, b in zip(small, full)]
        lines.append(f"| {res} | {name} | {' | '.join(cells)} |")
    for (where, name), found in gaps.items() if args.seeds > 1 else ():
        gap, off = found.mean(0), found.std(0, ddof=1)
        cells = [f"{gap[0, i]:+.3f} ± {off[0, i]:.3f} ({gap[1, i]:+.3f} ± {off[1, i]:.3f})"
                 for i in range(len(LEVELS))]
        lines.append(f"| {where} | {name}: less than {first} by | {' | '.join(cells)} |")
    return "\n".join(lines)


def table(finding, sizes, rows, args, speeds):
    """Scores, gaps and errors by noise level -> Markdown."""
    scores = {(res, name): [json.loads((folder(finding, res, name, seed, args)
                                        / "scores.json").read_text()) for seed in range(args.seeds)]
              for res in sizes for name in rows}
    first, *others = rows
    parts = [caption(finding, args), score_table(finding, sizes, rows, args, scores, speeds)]
    if others:
        parts.append(gap_table(sizes, first, others, args, scores))
    parts.append(error_table(sizes, first, others, args, scores))
    return "\n\n".join(parts)


def label_rows(sheets, names, title):
    """Pictures, one below the other, each with its name at its left; title: {x: text above}."""
    font, left, gap = ImageFont.load_default(15), 170, 4
    width = left + max(sheet.width for sheet in sheets)
    page = Image.new("RGB", (width, 26 + sum(sheet.height + gap for sheet in sheets)), "white")
    draw, y = ImageDraw.Draw(page), 26
    for x, text in title.items():
        draw.text((left + x, 4), text, "black", font)
    for sheet, name in zip(sheets, names):
        draw.text((6, y + sheet.height / 2), name, "black", font, "lm")
        page.paste(sheet, (left, y))
        y += sheet.height + gap
    return page


def pictures(finding, sizes, rows, args):
    """Samples of seed 0, a column per class, averaged as for the scores: finer detail is mostly
    grain. For schedules also what is decided when (Figure 3), averaged too -> Markdown.
    """
    sheets, names, decided, whose = [], [], [], []
    for res in sizes:
        for name in rows:
            out = folder(finding, res, name, 0, args)
            samples = Image.open(out / "samples.png").crop((0, 0, 10 * res, res))
            sheets.append(samples.reduce(2**halvings(res)).resize((720, 72), LANCZOS))
            names.append(f"{res}, {name}")
            if name in ("cosine", "shifted, 32"):
                strip = grid(list(np.load(out / "decided.npy")), 4)
                decided.append(strip.reduce(2**halvings(res)).resize((4 * 144, 144), LANCZOS))
                whose.append(f"{res}, {name}")
    name = re.sub(r"\W+", "-", title(finding, sizes, rows, args))
    sheet = label_rows(sheets, names, {0: "columns: 3, 4, ... 12 petals requested"})
    sheet.save(PICTURES / f"{name}.webp", quality=88, method=6)
    if decided:
        above = {0: "x_hat at t = 0.8", 144: "t = 0.5", 288: "t = 0.2", 432: "the sample"}
        sheet = label_rows(decided, whose, above)
        sheet.save(PICTURES / f"decided-{name}.webp", quality=88, method=6)
    return f"\n\n![Samples of seed 0, averaged](../benchmarks/{name}.webp)"


def write_result(title, text):
    """Put text between the marks of this title in docs/results.md, at its end if there are none."""
    start, end = f"<!-- {title} -->", f"<!-- end of {title} -->"
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "# Results\n"
    if start not in page:
        page = f"{page.rstrip()}\n\n## Finding: {title}\n\n{start}\n{end}\n"
    before, rest = page.split(start, 1)
    page = f"{before}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"
    write(PAGE, lambda file: file.write(page.encode()))         # a full disk leaves the old page


def parse_arguments(argv):
    parser = Parser(description="Measure a finding of the paper on flowers.")
    parser.add_argument("--finding", choices=FINDINGS, required=True)
    parser.add_argument("--sizes", type=int, nargs="+", help="(default: the finding's own)")
    parser.add_argument("--rows", nargs="+", metavar="ROW",
                        help="some of the finding's; others are compared with the first, in the "
                             "finding's order; a wrong name lists them (default: all)")
    parser.add_argument("--model", choices=uvit.PRESETS, default="tiny")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--sample-steps", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=1 if torch.cuda.is_available() else 2,
                        help="trainings at a time, the cores shared (default: 2, 1 with CUDA)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    args = parser.parse_args(argv)
    if args.sample_steps < 6 or args.samples < 10 or min(args.seeds, args.jobs) < 1:
        fail("--sample-steps must be at least 6, --samples at least 10, --seeds and --jobs at "
             "least 1")
    # Half of the rate of `tiny`, since the default of --batch is half of its batch.
    args.lr = 1e-3 if args.model == "tiny" else uvit.PRESETS[args.model]["training"]["lr"]
    finding = FINDINGS[args.finding]
    if not set(args.rows or []) <= set(finding.rows):
        fail(f"--rows must be of {', '.join(map(repr, finding.rows))}")
    args.sizes = sorted(set(args.sizes or finding.sizes))
    args.rows = [name for name in finding.rows if name in (args.rows or finding.rows)]
    return args


def main(argv=None):
    args = parse_arguments(argv)
    what = args.finding, args.sizes, args.rows
    cells = [(args.finding, res, name, seed, args)
             for seed in range(args.seeds) for res in args.sizes for name in args.rows]
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.finding == "dropout":
            for res in args.sizes:
                few_pictures(args.out / f"few-{res}", res)
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
            for n, done in enumerate(pool.map(cell, *zip(*cells)), 1):
                print(f"{n} of {len(cells)}: {done}", flush=True)
        speeds = paces(*what, args) if args.finding in ONLY["speed"] else {}
        text = table(*what, args, speeds) + pictures(*what, args)
        print(text)
        write_result(title(*what, args), text)
    except KeyboardInterrupt:
        fail("stopped: the same command goes on from here", 130)
    except OSError as error:
        fail(f"{error.filename or args.out}: {error.strerror or error}; once that is solved, the "
             "same command goes on")


if __name__ == "__main__":
    main()
