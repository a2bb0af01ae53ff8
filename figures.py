"""The figures of the README, and the curves of a run.

    python figures.py                            all figures, into assets/
    python figures.py schedule                   the paper's Figures 3 and 5
    python figures.py wavelet                    the paper's Figure 7
    python figures.py curves runs/NAME           runs/NAME/curves.png: losses by noise level
    python figures.py sizes 256                  what each model needs of a GPU (a table, printed)
"""
import contextlib
import dataclasses
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from cli import fail
from config import parse_config
from flowers import draw_flower
from memory import COMFORT, needed
from page import COLOURS, losses_by_level, read_log
from schedule import (alpha_sigma, logsnr_cosine, logsnr_interpolated, logsnr_schedule,
                      logsnr_shifted)
from train import loss_function
from uvit import PRESETS
from wavelet import dwt

ASSETS = Path(__file__).parent / "assets"


def plot(curves, size, x_range, y_range, title, ticks=lambda y: f"{y:g}"):
    """Curves as a PIL picture. curves: {name: (x (N,), y (N,), colour)}; ticks: labels of y."""
    w, h, scale, margin = size[0] * 4, size[1] * 4, 4, 190        # drawn at 4x, then reduced
    sheet = Image.new("RGB", (w, h), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13 * scale)
    (left, right), (low, high) = x_range, y_range
    legend = w - 40 - max(font.getlength(name) for name in curves)      # to the right of the box

    def at(x, y):
        return (margin + (x - left) / (right - left) * (legend - margin - 60),
                h - margin - (y - low) / (high - low) * (h - 2 * margin))

    draw.rectangle([at(left, high), at(right, low)], outline="#bbbbbb", width=scale)
    if low < 0 < high:
        draw.line([at(left, 0), at(right, 0)], fill="#dddddd", width=scale)
    for y in (low, 0 if low < 0 < high else (low + high) / 2, high):
        draw.text((margin - 12, at(left, y)[1]), ticks(y), fill="black", font=font, anchor="rm")
    for x in (left, (left + right) / 2, right):
        draw.text((at(x, low)[0], h - margin + 14), f"{x:g}", fill="black", font=font, anchor="mt")
    draw.text(((margin + legend - 60) / 2, 30), title, fill="black", font=font, anchor="mt")
    for i, (name, (x, y, colour)) in enumerate(curves.items()):
        y = torch.as_tensor(y).clamp(low, high).tolist()
        points = [at(a, b) for a, b in zip(torch.as_tensor(x).tolist(), y) if math.isfinite(b)]
        draw.line(points, fill=colour, width=2 * scale, joint="curve")
        for a, b in points if len(points) < 20 else []:             # few: mark each
            draw.ellipse([a - 12, b - 12, a + 12, b + 12], fill=colour)
        draw.text((legend, margin + 60 * (i + .5)), name, colour, font, "lm")
    return sheet.resize(size, Image.Resampling.LANCZOS)


def save(sheet, file):
    sheet.save(file, lossless=True, method=6)           # PNG ignores both
    print(file)


def to_pixels(x):
    """(3, H, W) in [-1, 1] -> (H, W, 3) uint8."""
    return ((x + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()


def flower(res):
    """A flower of six petals: (1, 3, res, res) in [-1, 1]."""
    picture, _ = draw_flower(np.random.default_rng(2), 6, res)
    return torch.from_numpy(picture).permute(2, 0, 1)[None] * 2 - 1


def figure_3():
    """A 512 x 512 picture, t = 0 to 1, averaged to 64 x 64: cosine above, shifted below."""
    x = flower(512)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    times, side, gap = torch.linspace(0, 1, 9), 96, 4
    strip = Image.new("RGB", (len(times) * (side + gap) - gap, 2 * side + gap), "white")
    for row, name in enumerate(("cosine", "shifted")):
        alpha, sigma = alpha_sigma(logsnr_schedule(name, 512, 64)(times))
        for column in range(len(times)):
            z = F.avg_pool2d(alpha[column] * x + sigma[column] * eps, 8)[0]
            tile = Image.fromarray(to_pixels(z)).resize((side, side), Image.Resampling.NEAREST)
            strip.paste(tile, (column * (side + gap), row * (side + gap)))
    t, curves = torch.linspace(0, 1, 400), {}
    for name, dark, light in (("cosine", "#1f5fa8", "#8fb8e6"), ("shifted", "#b3401f", "#eba58f")):
        alpha, sigma = alpha_sigma(logsnr_schedule(name, 512, 64)(t))
        curves[f"alpha, {name}"] = t, alpha.flatten(), dark
        curves[f"sigma, {name}"] = t, sigma.flatten(), light
    beside = plot(curves, (460, strip.height), (0, 1), (0, 1), "alpha and sigma over t, 512 x 512")
    sheet = Image.new("RGB", (strip.width + 12 + beside.width, strip.height), "white")
    sheet.paste(strip, (0, 0))
    sheet.paste(beside, (strip.width + 12, 0))
    return sheet


def figure_5():
    """logsnr over t at 512 x 512."""
    t = torch.linspace(0, 1, 400)
    return plot({"cosine": (t, logsnr_cosine(t), "#333333"),
                 "shifted to 256": (t, logsnr_shifted(t, 512, 256), COLOURS[0]),
                 "shifted to 32": (t, logsnr_shifted(t, 512, 32), COLOURS[1]),
                 "interpolated 32 to 256": (t, logsnr_interpolated(t, 512), COLOURS[2])},
                (600, 360), (0, 1), (-25, 25), "logsnr over t, 512 x 512")


def figure_7():
    """Two levels of the wavelet: picture, bands, and the 48 channels that the network gets."""
    x = flower(256)
    one, two = dwt(x, 1), dwt(x, 2)

    def tile(band, gain):                   # details are small and signed: amplified about grey
        return to_pixels(band[0] * gain)

    bands = np.full((256, 256, 3), 255, np.uint8)                   # the usual nested picture
    for c, (row, column) in enumerate([(0, 0), (0, 64), (64, 0), (64, 64)]):
        bands[row:row + 64, column:column + 64] = tile(two[:, 3 * c:3 * c + 3], 1 if c == 0 else 4)
    for c, (row, column) in enumerate([(0, 128), (128, 0), (128, 128)], start=1):
        bands[row:row + 128, column:column + 128] = tile(one[:, 3 * c:3 * c + 3], 4)
    # 48 channels as 16 groups of 3: coarse bands, then fine ones by place in the space to depth.
    coarse = [two[:, 3 * c:3 * c + 3] for c in range(4)]
    fine = two[:, 12:].unflatten(1, (3, 3, 4))              # band, colour, place
    folded = [fine[:, band, :, place] for band in range(3) for place in range(4)]
    channels = np.full((256 + 12, 256 + 12, 3), 255, np.uint8)
    for c, band in enumerate(coarse + folded):
        row, column = c // 4 * 68, c % 4 * 68
        channels[row:row + 64, column:column + 64] = tile(band, 1 if c == 0 else 4)
    sheet = Image.new("RGB", (256 + 24 + 256 + 24 + 268, 268), "white")
    for left, part in ((0, to_pixels(x[0])), (280, bands), (560, channels)):
        sheet.paste(Image.fromarray(part), (left, 6 if part.shape[0] == 256 else 0))
    return sheet


def curves(folder):
    """Loss of the EMA by noise level over the steps of a run, logarithmic: is it learning?"""
    try:
        reports = read_log(Path(folder, "log.jsonl"))[1]
    except OSError as error:
        fail(f"{folder}/log.jsonl: {error.strerror}")
    if len(reports) < 2:
        fail(f"{folder}/log.jsonl: holds {len(reports)} reports, a curve takes two or more")
    named = {name: (steps, torch.tensor(losses).log10(), colour) for (name, (steps, losses)), colour
             in zip(losses_by_level(reports).items(), COLOURS)}
    known = torch.cat([losses for _, losses, _ in named.values()])
    low, high = known.min().floor().item(), known.max().ceil().item()
    sheet = plot(named, (720, 400), (0, reports[-1]["step"]), (low, high),
                 "loss by noise level over steps", ticks=lambda y: f"{10**y:.2g}")
    save(sheet, Path(folder, "curves.png"))


def sizes(res):
    """A table of the models that have this size: batch and steps, GB of a GPU with bf16 and
    compiled, computed.
    """
    configs, why = [], io.StringIO()
    for model in PRESETS:
        with contextlib.suppress(SystemExit), contextlib.redirect_stderr(why):
            configs.append(parse_config(["--res", res, "--model", model]))
    if not configs:
        fail(why.getvalue().splitlines()[0])
    print("| `--model` | M weights | batch, steps | fixed GB | GB a picture "
          "| pictures at once in 24 GB | in 80 GB |\n|-|-|-|-|-|-|-|")
    for config in configs:
        config = dataclasses.replace(config, bf16=True, compile=True)
        fixed, each, weights = needed(config, 1000, 1, "cuda", loss_function(config))
        fit = [max(0, int((COMFORT["cuda"] * gb * 1e9 - fixed) / each)) for gb in (24, 80)]
        print(f"| `{config.model}` | {weights / 1e6:,.1f} | {config.batch:,}, {config.steps:,} | "
              f"{fixed / 1e9:.1f} | {each / 1e9:.2f} | {fit[0] or 'none'} | {fit[1]} |")


def main(arguments):
    what, *rest = arguments or ["all"]
    if what == "curves" and len(rest) == 1:
        return curves(rest[0])
    if what == "sizes" and len(rest) == 1:
        return sizes(rest[0])
    if what not in ("all", "schedule", "wavelet") or rest:
        fail("usage: python figures.py [schedule | wavelet | curves FOLDER | sizes RES]")
    if what in ("all", "schedule"):
        save(figure_3(), ASSETS / "figure3.webp")
        save(figure_5(), ASSETS / "figure5.webp")
    if what in ("all", "wavelet"):
        save(figure_7(), ASSETS / "figure7.webp")


if __name__ == "__main__":
    main(sys.argv[1:])
