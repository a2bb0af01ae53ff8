"""Pictures: a folder or zip of them, or flowers drawn here when there is none.

A dataset is indexed by n, the running number of a picture in training: `dataset[n]` is a function
of (seed, n) alone, so that any rank, worker or resumed run sees in step k exactly the pictures it
should. `classes` lists the class names ([] if there are none); a class of len(classes) means none.

    dataset[n] -> x: (3, H, W) float32 in [-1, 1], label: (2 + L,) int64, the row of text.py's
                  `condition`, broken: {file it skipped: why}
"""
import io
import math
import os
import stat
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from schedule import sides
from text import condition

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]  # by content; no PostScript
CACHE_BYTES = 1 << 28                       # decoded pictures kept in memory, per process
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 27    # of one picture, of one file: else memory has no bound


# ---------------------------------------------------------------------------- the built-in flowers

PETALS = {
    "red": (.86, .12, .15), "orange": (.97, .50, .10), "yellow": (.99, .83, .17),
    "white": (.97, .95, .92), "pink": (.97, .50, .67), "magenta": (.82, .16, .55),
    "purple": (.52, .26, .75), "blue": (.26, .42, .89)}
GROUNDS = {
    "green": (.18, .36, .20), "dark green": (.06, .17, .12), "brown": (.30, .21, .15),
    "blue": (.55, .72, .85), "grey": (.45, .47, .48), "cream": (.90, .86, .74),
    "night blue": (.08, .10, .22)}
DISCS = {
    "yellow": (.98, .78, .15), "brown": (.36, .20, .10), "green": (.55, .65, .20),
    "dark": (.14, .09, .12)}


NUMBERS = "three four five six seven eight nine ten eleven twelve".split()


def never_shown(colour, petals):
    """A quarter of all combinations never occurs in flowers with captions: a prompt may be new."""
    return (list(PETALS).index(colour) + petals) % 4 == 0


def draw_flower(rng, petals, res, colours=PETALS):
    """A flower seen from above, drawn by formulas, its edges equally sharp at every resolution.

    rng: numpy Generator; petals: 3 to 12; res: size, d or "HxW"; colours: names to choose from ->
    picture: (H, W, 3) float32 in [0, 1], caption: str.
    All petals are one petal, folded by angle: turned by 2 pi / petals the flower is itself again.
    """
    H, W = sides(res)
    res = min(H, W)                         # the shorter side spans [-1, 1]

    def pick(table, names):
        name = list(names)[rng.integers(len(names))]
        colour = np.clip(np.array(table[name]) + rng.uniform(-.06, .06, 3), 0, 1)
        return name, colour.astype(np.float32)

    def cover(depth):                       # anti-aliased: 1 inside, 0 outside, one pixel wide
        return np.clip(.5 + depth * (res / 2), 0, 1)

    (petal_name, tip) = pick(PETALS, colours)
    (ground_name, ground), (_, disc) = pick(GROUNDS, GROUNDS), pick(DISCS, DISCS)
    base = np.clip(tip * rng.uniform(.35, 1.15) + rng.uniform(-.1, .2), 0, 1).astype(np.float32)
    length, turn, twist = rng.uniform(.62, .88), rng.uniform(0, 2 * np.pi), rng.uniform(-.35, .35)
    x0, y0 = rng.uniform(-.12, .12, 2).tolist()
    p, q = rng.uniform(.5, 1.1), rng.uniform(.3, .9)    # outline s^p (1 - s)^q: round to pointed

    # float32 and colours first, (3, H, W): numpy is four times as fast as the other way round.
    x = ((np.arange(W, dtype=np.float32) + .5) * 2 - W)[None, :] / res
    y = ((np.arange(H, dtype=np.float32) + .5) * 2 - H)[:, None] / res
    tip, base, ground, disc = (colour[:, None, None] for colour in (tip, base, ground, disc))

    def distance(x, y):
        return np.sqrt(x * x + y * y)

    # Background: a soft gradient and a few discs out of focus.
    angle = rng.uniform(0, 2 * np.pi)
    picture = ground * (1 + .25 * (math.cos(angle) * x + math.sin(angle) * y))
    for bx, by, radius, light in rng.uniform((-1, -1, .1, -.06), (1, 1, .35, .10), (3, 4)).tolist():
        off = distance(x - bx * W / res, y - by * H / res)
        picture += light * np.clip((radius - off) / (.4 * radius), 0, 1)

    # Polar coordinates, the angle folded into one petal's sector; u runs along the petal, w across.
    r = distance(x - x0, y - y0)
    theta = np.arctan2(y - y0, x - x0) + turn + twist * r
    phi = np.mod(theta, 2 * np.pi / petals) - np.pi / petals
    u, w = r * np.cos(phi), np.abs(r * np.sin(phi))
    s = np.clip(u / length, 1e-4, 1 - 1e-4)

    # Half-width of the petal, at most as wide as its sector where it is widest.
    widest = p / (p + q)
    half = min(.42 * length, rng.uniform(.72, 1.0) * widest * length * math.tan(np.pi / petals))
    width = half * (s / widest) ** p * ((1 - s) / (1 - widest)) ** q
    picture *= 1 - .35 * np.clip(1 - (r / length - .5) / .7, 0, 1)      # its shadow
    across = np.clip(w / width, 0, 1)
    light = 1 - .38 * across * across * across - .10 * (1 - s)
    veins = int(rng.integers(2, 5))
    vein = .5 + .5 * np.cos(2 * np.pi * veins * across)
    light *= 1 - .16 * (vein * vein * vein) ** 2 * (s < .93)
    speckled = rng.random() < .5
    for at, aside in rng.uniform((.35, .05), (.75, .6), (4 * speckled, 2)).tolist():
        at_width = half * (at / widest) ** p * ((1 - at) / (1 - widest)) ** q
        light *= 1 - .55 * cover(.022 - distance(u - at * length, w - aside * at_width))
    petal = (base + (tip - base) * s ** .7) * light
    picture += cover(np.minimum(width - w, length - u)) * (petal - picture)

    # The disc in the middle: rings of grains, as many to a ring as keep the symmetry.
    radius = length * rng.uniform(.17, .26)
    around = petals * (1 + 12 // petals)
    grains = .5 + .5 * np.cos(5 * np.pi * r / radius) * np.cos(around * theta)
    shade = (.72 + .42 * grains) * (1 - .35 * np.clip(r / radius, 0, 1) ** 4)
    picture += cover(radius - r) * (disc * shade - picture)

    # Some captions say more than others, and numbers are words or figures.
    count = NUMBERS[petals - 3] if rng.random() < .5 else str(petals)
    shape = ("pointed " if q > .65 else "round ") if rng.random() < .5 else ""
    rest = f"{', speckled,' if speckled else ''} on {ground_name}" if rng.random() < .5 else ""
    caption = f"a {petal_name} flower with {count} {shape}petals{rest}"
    return np.clip(picture, 0, 1).transpose(1, 2, 0), caption


class Flowers:
    """Endless flowers: class c has c + 3 petals. Indexing: see the module's docstring.

    With captions (tokens), a quarter of the combinations of colour and number is never shown.
    """

    names, unread = [], {}

    def __init__(self, res, seed=0, tokens=None, portrait=False):
        self.res, self.seed, self.tokens, self.portrait = res, seed, tokens, portrait
        self.classes = [] if tokens else [f"{k} petals" for k in range(3, 13)]

    def __getitem__(self, n):
        rng = np.random.default_rng((self.seed, n))
        label, res, colours = int(rng.integers(10)), self.res, PETALS
        upright = self.portrait and rng.random() < .5
        if upright:
            res = "{1}x{0}".format(*sides(res))
        if self.tokens:
            colours = [colour for colour in PETALS if not never_shown(colour, label + 3)]
        picture, caption = draw_flower(rng, label + 3, res, colours)
        picture = np.rot90(picture, int(upright)).copy()
        tokens = self.tokens(caption) if self.tokens else []
        x = torch.from_numpy(picture).permute(2, 0, 1) * 2 - 1
        return x, condition(label * (not self.tokens), upright, tokens), {}


# ---------------------------------------------------------------------------- real pictures

def to_rgb(image):
    """Any picture PIL reads -> RGB, 8 bit: EXIF turn, transparency over white, 16 bit scaled.

    Floats are taken to end at 1, 255 or 65535, the first that none exceeds by more than half.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):          # 16 bit: PIL's own convert would clip it
        deep = np.asarray(image, np.int32).clip(0, 65535)
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        deep = np.asarray(image)
        most = np.max(deep, where=np.isfinite(deep), initial=0)
        top = 1 if most <= 1.5 else 255 if most <= 255 * 1.5 else 65535
        deep = np.nan_to_num(deep, nan=0).clip(0, top) * (255 / top)
        image = Image.fromarray(deep.round().astype(np.uint8))
    if image.mode in ("LA", "PA", "La", "RGBa", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def cover(image, width, height):
    """RGB picture -> the same, as small as covers width x height. Raises ValueError if huge."""
    scale = max(width / image.width, height / image.height)
    size = [max(width, round(image.width * scale)), max(height, round(image.height * scale))]
    if size[0] * size[1] > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are too long and thin")
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


def printable(text):
    """One line for a terminal, whatever a file is named: é stays, line breaks become \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


def reason(error):
    return f"{type(error).__name__}: {printable(str(error))}"[:200]


class Pictures:
    """A folder (walked recursively, links followed) or zip; first-level folders are the classes.

    An epoch is a permutation of all files by (seed, epoch). A file that cannot be read is skipped,
    the next one of the epoch taking its place, and noted in `broken`, {name: why}. Once these are
    more than half of all files, the pictures come out grey: it is for the caller to stop.
    tokens: what makes a caption, a line of the .txt beside the picture, a row of numbers; then
    there are no classes. portrait: pictures that stand upright are turned to lie.
    Raises ValueError if there is nothing to read.
    """

    def __init__(self, path, res, seed=0, flip=True, tokens=None, portrait=False):
        self.path, self.res, self.seed, self.flip = str(path), res, seed, flip
        self.tokens, self.portrait = tokens, portrait
        self.cache, self.cached, self.zip, self.order = {}, 0, None, (None, None)
        self.broken, self.unread = {}, {}   # files, folders: {name: why}
        self.texts = {}                     # captions: {name of a picture, no ending: file}
        self.is_folder = os.path.isdir(self.path)
        try:
            self.names = sorted(self.folder_names() if self.is_folder else self.zip_names())
        except FileNotFoundError:
            raise ValueError(f"--data {self.path}: no such folder or .zip")
        except Exception as error:          # whatever a damaged zip, or one that is none, brings up
            raise ValueError(f"--data {self.path}: neither a folder nor a .zip that can be read "
                             f"({printable(str(error))})")
        if not self.names:
            why = "; ".join(self.unread.values()) or " ".join(sorted(ENDINGS))
            raise ValueError(f"--data {self.path}: no picture there ({why})")
        folders = [[part for part in name.split("/")[:-1] if part not in ("", ".", "..")]
                   for name in self.names]
        # A zip of one folder is that folder: what all names begin with says nothing.
        skip = 0 if self.is_folder else len(os.path.commonprefix(folders))
        first = [(folder[skip:] or [None])[0] for folder in folders]
        self.classes = [] if tokens else sorted(set(first) - {None})
        number = {folder: i for i, folder in enumerate([*self.classes, None])}
        self.labels = [number.get(folder, 0) for folder in first]
        self.captioned = sum(os.path.splitext(name)[0] in self.texts for name in self.names)
        if tokens and not self.captioned:
            raise ValueError(f"--data {self.path}: no picture has a caption, a .txt beside it")

    def __getstate__(self):                 # to a worker process: open files and memory stay here
        return self.__dict__ | dict(zip=None, cache={}, cached=0)

    def folder_names(self):
        seen = set()

        def unread(error):
            self.unread[os.path.relpath(error.filename, self.path)] = reason(error)

        for folder, folders, files in os.walk(self.path, onerror=unread, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:                # a link in a circle, or a second one to the same folder
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for file in files:
                name = Path(folder, file).relative_to(self.path).as_posix()
                if Path(file).suffix.lower() in ENDINGS and not file.startswith("."):
                    yield name
                elif Path(file).suffix.lower() == ".txt":
                    self.texts[os.path.splitext(name)[0]] = name

    def zip_names(self):
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise ValueError("not a file")
        with zipfile.ZipFile(self.path) as archive:
            self.texts = {os.path.splitext(name)[0]: name for name in archive.namelist()
                          if name.lower().endswith(".txt")}
            for name in set(archive.namelist()):
                hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/")
                             if part not in (".", ".."))
                if Path(name).suffix.lower() in ENDINGS and name[-1] != "/" and not hidden:
                    yield name

    def bytes(self, name):
        """Name -> what the file holds. Raises ValueError if it is unfit."""
        if not self.is_folder:
            if self.zip is None or self.zip[0] != os.getpid():  # a forked worker opens its own
                self.zip = os.getpid(), zipfile.ZipFile(self.path)
            info = self.zip[1].getinfo(name)
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError("compressed in a way that has no bound")
            file, size = self.zip[1].open(info), info.file_size
        else:
            file = os.path.join(self.path, name)
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):                # a pipe would wait for ever
                raise ValueError("not a file")
            file, size = open(file, "rb"), status.st_size
        with file:
            if size > MAX_BYTES:
                raise ValueError(f"{size} bytes are too many")
            return file.read(size)

    def captions(self, name):
        """The lines of the .txt beside a picture, [] without one. Raises ValueError if unfit."""
        beside = self.texts.get(os.path.splitext(name)[0])
        try:
            text = self.bytes(beside).decode("utf-8-sig", "replace") if beside else ""
        except Exception as error:          # as a picture's: whatever the disk raises
            raise ValueError(f"its caption {beside}: {reason(error)}")
        return [" ".join(line.split()) for line in text.splitlines() if line.strip()]

    def open(self, name):
        """One file -> RGB picture that covers res, whether it was turned. Raises what is wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # damage that PIL can live with
            raw = self.bytes(name)
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                if image.info.get("progressive") and raw.count(b"\xff\xda") > 100:
                    raise ValueError("too many scans")          # each takes as long as a picture
                height, width = sides(self.res)
                side = max(height, width) * 3 // 2              # JPEG: decode what is needed,
                image.draft("RGB", (side, side))                # above 50 dB from all of it
                tile = getattr(image, "tag_v2", {})             # of a TIFF, may exceed the picture
                if max(image.width * image.height,
                       tile.get(322, 0) * tile.get(323, 0)) > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                image = to_rgb(image)
                upright = self.portrait and image.height > image.width
                if upright:
                    image = image.transpose(Image.Transpose.ROTATE_90)
                return cover(image, width, height), upright

    def picture(self, i):
        """File i -> what is in it, (pixels (H, W, 3) uint8, whether it was turned, its captions),
        and {} (kept in memory); or None, {name: why} if it is broken.
        """
        if i not in self.cache:
            try:
                image, upright = self.open(self.names[i])
                pixels = np.asarray(image)
                content = pixels, upright, self.captions(self.names[i]) if self.tokens else []
            except Exception as error:      # whatever PIL or the disk raises: the run must go on
                self.broken[self.names[i]] = reason(error)
                return None, {self.names[i]: reason(error)}
            self.broken.pop(self.names[i], None)
            if self.cached + pixels.nbytes > CACHE_BYTES:
                return content, {}
            self.cache[i], self.cached = content, self.cached + pixels.nbytes
        return self.cache[i], {}

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.names))
        if self.order[0] != epoch:
            rng = np.random.default_rng((1, self.seed, epoch))
            self.order = epoch, rng.permutation(len(self.names))
        rng, broken = np.random.default_rng((2, self.seed, n)), {}
        for k in range(len(self.names)):
            i = self.order[1][(place + k) % len(self.names)]
            content, why = self.picture(i)
            broken |= why
            if content is not None or 2 * len(self.broken) > len(self.names):
                break
        height, width = sides(self.res)
        if content is None:
            content = np.full((height, width, 3), 127, np.uint8), False, []
        pixels, upright, captions = content
        top = rng.integers(0, pixels.shape[0] - height + 1)
        left = rng.integers(0, pixels.shape[1] - width + 1)
        crop = pixels[top:top + height, left:left + width]
        if self.flip and rng.random() < .5:
            crop = crop[::-1] if upright else crop[:, ::-1]     # left and right as they stood
        x = torch.from_numpy(crop.copy()).permute(2, 0, 1).float() / 127.5 - 1
        tokens = []
        if self.tokens:
            tokens = self.tokens(captions[rng.integers(len(captions))] if captions else "")
        return x, condition(self.labels[i], upright, tokens), broken
