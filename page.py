"""The page of a run, runs/NAME/index.html: one file without scripts, which refreshes itself.

`write_page` makes it from what is in the folder. It needs nothing from elsewhere, and can be opened
from the disk. A curve has 32 points for each doubling of the steps, so that the page of a run of a
month is as small as that of an hour.
"""
import contextlib
import html
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

from checkpoint import write

PER_OCTAVE = 32                             # points of a curve for each doubling of the steps
REFRESH = 30                                # seconds
REFERENCE = Path(__file__).parent / "assets" / "reference.jsonl"    # the log of `python train.py`
COMPARABLE = dict(data="", res=64, text="", schedule="shifted", noise_d=32)   # runs that show it
COLOURS = "#1f5fa8", "#b3401f", "#2c8a4b", "#8a5a2c", "#7a3f9d", "#c08a1e", "#555555", "#d0608f"

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --faint: #bbb; }
@media (prefers-color-scheme: dark) { :root { --back: #16181c; --text: #ddd; --faint: #555; } }
body { background: var(--back); color: var(--text); font: 16px/1.5 system-ui, sans-serif;
       max-width: 60rem; margin: 1rem auto; padding: 0 1rem; }
img, svg { max-width: 100%; height: auto; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; }
.newest img { min-width: min(100%, 40rem); }
.strip figure { display: inline-block; width: 8rem; margin: .2rem; }
.strip img { width: 100%; }
svg { font: 13px system-ui, sans-serif; fill: var(--text); }
@media (max-width: 40rem) { svg { font-size: 22px; } }
svg polyline { fill: none; stroke-width: 2; stroke-linecap: round;
               vector-effect: non-scaling-stroke; }
.axis { stroke: var(--faint); stroke-width: 1; }
.reference { stroke: var(--faint); stroke-width: 4; }
code, pre { font-size: .9rem; overflow-wrap: anywhere; white-space: pre-wrap; }
@media (prefers-color-scheme: dark) { .curve { filter: brightness(1.6); } }
"""


# ---------------------------------------------------------------------------- curves

def read_log(file):
    """log.jsonl -> its lines, dicts: those of the training, those of reports (noise levels)."""
    lines = []
    for line in Path(file).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):       # the last one may have been cut short
            lines.append(json.loads(line))
    return ([line for line in lines if "loss" in line],
            [line for line in lines if "loss_by_noise_level" in line])


def thinned(steps, values):
    """Means over stretches of steps, PER_OCTAVE for each doubling: ([step, ...], [mean, ...]).

    Values that are None, or not finite, are left out.
    """
    stretches = {}
    for step, value in zip(steps, values):
        if step > 0 and value is not None and math.isfinite(value):
            stretches.setdefault(int(PER_OCTAVE * math.log2(step)), []).append((step, value))
    means = [[sum(part) / len(pairs) for part in zip(*pairs)] for pairs in stretches.values()]
    return tuple(map(list, zip(*means))) if means else ([], [])


def losses_by_level(reports):
    """{"t = 0.06": (steps, losses), ...} of the reports of a log."""
    steps = [line["step"] for line in reports]
    levels = len(reports[0]["loss_by_noise_level"]) if reports else 0
    return {f"t = {(level + .5) / levels:.2f}":
            thinned(steps, [line["loss_by_noise_level"][level] for line in reports])
            for level in range(levels)}


def decades(low, high):
    """The powers of ten from low to high, and both ends where there are fewer than two."""
    powers = [10.0**k for k in range(math.ceil(math.log10(low) - 1e-9),
                                     math.floor(math.log10(high) + 1e-9) + 1)]
    return powers if len(powers) > 1 else [low, high]


def chart(curves, title, about, last=0, behind=None):
    """Curves on logarithmic axes as inline SVG.

    curves: {name: (steps, values)}, values > 0; about: what a screen reader says of it; last: step
    up to which the axis goes at least; behind: more curves, in grey.
    """
    pairs = [*curves.values(), *(behind or {}).values()]
    steps = [step for steps, _ in pairs for step in steps]
    values = [value for _, values in pairs for value in values if value > 0]
    if not values:
        return ""
    left, right = min(steps), max(*steps, last, min(steps) + 1)
    low, high = min(values), max(*values, 1.01 * min(values))
    w, h, margin, legend = 640, 400, 70, 100

    def at(step, value):
        x = math.log(step / left) / math.log(right / left)
        y = math.log(value / low) / math.log(high / low)
        return f"{margin + x * (w - margin - legend):.1f},{h - 40 - y * (h - 80):.1f}"

    parts = [f'<text x="{margin}" y="20">{title}</text>']
    for value in decades(low, high):
        x, y = at(left, value).split(",")
        parts.append(f'<line class="axis" x1="{x}" y1="{y}" x2="{w - legend}" y2="{y}"/>'
                     f'<text x="{margin - 6}" y="{y}" text-anchor="end" dy="4">{value:.3g}</text>')
    for step in decades(left, right):
        x = at(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{h - 16}" text-anchor="middle">{step:,.0f}</text>')

    def points_of(pair):
        return [at(*point) for point in zip(*pair) if point[1] > 0]

    for pair in (behind or {}).values():
        parts.append(f'<polyline class="reference" points="{" ".join(points_of(pair))}"/>')
    for i, (name, pair) in enumerate(curves.items()):
        if pair[0]:
            colour, points = COLOURS[i % len(COLOURS)], points_of(pair)
            dot = ' style="stroke-width: 8"' * (len(points) == 1)
            points = " ".join(points * (2 if dot else 1))           # twice the same: a dot
            parts.append(f'<g class="curve"><polyline points="{points}" stroke="{colour}"{dot}/>'
                         f'<text x="{w - legend + 8}" y="{60 + 28 * i}" fill="{colour}">'
                         f'{name}</text></g>')
    return (f'<svg viewBox="0 0 {w} {h}" width="100%" role="img" '
            f'aria-label="{html.escape(about)}">{"".join(parts)}</svg>')


# ---------------------------------------------------------------------------- the page

def fell(name, pair):
    steps, values = pair
    return f"{name} from {values[0]:.3g} at step {steps[0]:.0f} to {values[-1]:.3g} at step " \
        f"{steps[-1]:.0f}" if steps else f"{name}: nothing yet"


def time_left(seconds):
    for size, name in ((86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name} left"
    return f"{seconds:.0f} seconds left"


def status(lines, config, state):
    """One line: how far the run is, how fast, how long it will take."""
    step = lines[-1]["step"] if lines else 0
    speeds = [line["images_per_second"] for line in lines[-10:] if line["images_per_second"]]
    parts = [f"step {step:,} of {config['steps']:,}"]
    if speeds:
        speed = sum(speeds) / len(speeds)
        parts.append(f"{speed:,.0f} pictures a second" if speed >= 10 else
                     f"{speed:.1f} pictures a second")
        if state == "training":
            parts.append(time_left((config["steps"] - step) * config["batch"] / speed))
    at = time.strftime("%d %B %Y, %H:%M:%S")
    return " · ".join([f"<strong>{state}</strong>", *parts, f"last update: {at}"])


def grids(out):
    """Names of the older grids, at most two for each doubling of the steps, and of the newest."""
    names = [file.name for file in Path(out).glob("grid-*.png") if file.name[5:-4].isdecimal()]
    names.sort(key=lambda name: int(name[5:-4]))
    kept = {int(2 * math.log2(max(1, int(name[5:-4])))): name for name in names}
    return list(kept.values())[:-1], names[-1] if names else None


def page(out, config, command, state, lines, reports, broken):
    """-> the HTML of it.

    config: dict of settings; state: "training", "stopped", "finished" or "failed"; lines, reports:
    of read_log; broken: names of files that were skipped.
    """
    esc, loss = html.escape, thinned([line["step"] for line in lines],
                                     [line["loss"] for line in lines])
    older, newest = grids(out)
    levels, reference = losses_by_level(reports), {}
    if levels and COMPARABLE.items() <= config.items() and REFERENCE.exists():
        reference = losses_by_level([report for report in read_log(REFERENCE)[1]
                                     if report["step"] <= config["steps"]])
    data = config["data"] or "flowers drawn by a formula"
    body = [f"<h1>{esc(Path(out).name)}</h1>", f"<p>{status(lines, config, state)}</p>",
            f"<p>Network <code>{config['model']}</code>, pictures of {config['res']} pixels: "
            f"{esc(data)}</p>"]
    if newest:
        at = f"{int(newest[5:-4]):,}"
        body.append(f'<figure class="newest"><img src="{newest}" alt="Samples at step {at}">'
                    f"<figcaption>Samples at step {at}, by the averaged weights (EMA), without "
                    "guidance. Each place has the same noise as in earlier grids."
                    "</figcaption></figure>")
    body.append('<div class="strip">' + "".join(
        f'<figure><a href="{name}"><img src="{name}" loading="lazy" alt="Samples"></a>'
        f"<figcaption>step {int(name[5:-4]):,}</figcaption></figure>" for name in older) + "</div>")
    body.append("<h2>Is it learning?</h2><p>It is while these curves fall: losses of the averaged "
                "weights on 16 training pictures, from little noise (t near 0) to nearly pure "
                "noise (t near 1). Both axes are logarithmic."
                + " Grey: a whole run of <code>python train.py</code>." * bool(reference) + "</p>")
    about = "; ".join(fell(name, pair) for name, pair in levels.items())
    body.append(chart(levels, "loss by noise level over steps", about, config["steps"], reference)
                or "<p>From the first grid on.</p>")
    body.append("<p>The training loss looks flat sooner, since most of it comes from little noise."
                "</p>" + chart({"loss": loss}, "loss over steps", fell("loss", loss),
                               config["steps"]))
    skipped = lines[-1]["skipped"] if lines else 0
    body.append(f"<p>Left out: {skipped} gradients that were not finite, {len(broken)} pictures "
                f"that could not be read{': ' if broken else ''}{esc(', '.join(list(broken)[:5]))}"
                f"{', ... (broken.txt)' if len(broken) > 5 else ''}.</p>")
    longer = f" --steps {2 * config['steps']}" * (state == "finished")
    body.append(f"<h2>Go on</h2><p>"
                f"{'To train for longer' if longer else 'If it stopped, this command resumes'}:</p>"
                f"<pre>{esc(command + longer)}</pre>")
    if newest:
        draw = f"python sample.py --ckpt {shlex.quote(str(Path(out, 'model.pt')))}"
        body.append(f"<p>To draw pictures, now or later, into samples/:</p><pre>{esc(draw)}</pre>")
    settings = "\n".join(f"{name} = {value}" for name, value in config.items())
    body.append(f"<details><summary>Settings</summary><pre>{esc(settings)}</pre></details>")
    refresh = f'<meta http-equiv="refresh" content="{REFRESH}">' * (state == "training")
    return (f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{refresh}\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{esc(Path(out).name)}</title><style>{STYLE}</style></head>\n<body>"
            + "\n".join(body) + "</body></html>\n")


def command_line():
    """How this process was started, for the shell; of several machines, on this one."""
    here, world = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    by = f"torchrun --nproc_per_node={here} " if here > 1 else "python "
    nodes = "--nnodes=... --node-rank=... --master-addr=... " * (world > here)
    return by + nodes + shlex.join(sys.argv)


def write_page(out, config, state, broken):
    """runs/NAME/index.html from the folder of a run. Raises OSError."""
    lines, reports = read_log(Path(out, "log.jsonl"))
    text = page(out, config, command_line(), state, lines, reports, broken)
    write(Path(out, "index.html"), lambda file: file.write(text.encode("utf-8", "replace")))
