"""Pictures to learn from: a folder or .zip, or the built-in flowers when there is none.

A dataset is indexed by n, the running number of a picture in training: `dataset[n]` is a function
of (seed, n) alone, so that any rank, loader process or resumed run sees the same pictures at the
same step. `classes` lists the names of the classes, [] if there are none.

    dataset[n] -> x (3, H, W) uint8 (see from_uint8), a Condition of numbers (label -1: no class),
                  {name of a file that was skipped: why}
"""
import contextlib
import io
import os
import stat
import warnings
import zipfile
from collections import ChainMap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from flowers import Flowers
from schedule import height_width
from text import tokenizer
from uvit import Condition

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]  # by content; no PostScript
CACHE_BYTES = 1 << 28                       # decoded pictures kept in memory, per process
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 27    # of one picture, of one file: else memory has no bound


def load_dataset(config):
    """Config -> its dataset. Raises ValueError, in one line, if it cannot be read."""
    tokens = tokenizer(config.text, config.text_length) if config.text else None
    if not config.data:
        return Flowers(config.res, config.seed, tokens, config.portrait)
    return Pictures(config.data, config.res, config.seed, config.flip, tokens, config.portrait)


def collate(items):
    """Items of a dataset -> x (B, 3, H, W) uint8, a Condition of tensors, {skipped file: why}."""
    x, conditions, skipped = zip(*items)
    return torch.stack(x), stacked(conditions), dict(ChainMap(*skipped))


def stacked(conditions):
    """Conditions of plain numbers (tokens: [] for none) -> one Condition of tensors."""
    label, rotated, tokens = map(torch.tensor, zip(*conditions))
    return Condition(label, rotated, tokens if tokens.numel() else None)


def moved(tensor, device):
    """To a device, for CUDA without waiting: MPS may copy what was freed (pytorch #189690)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def to_device(cond, device):
    """A Condition's tensors to a device."""
    return Condition(*(part if part is None else moved(part, device) for part in cond))


def from_uint8(x):
    """Pictures of a dataset, uint8 -> float32 in [-1, 1]."""
    assert x.dtype == torch.uint8, f"pictures must be uint8, not {x.dtype}"
    return x.float() / 127.5 - 1


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


# ---------------------------------------------------------------------------- one picture

def to_rgb(image):
    """Any picture PIL reads -> RGB, 8 bit: EXIF turn, transparency over white, 16 bit scaled.

    Floats are taken to end at 1, 255 or 65535, the first that none exceeds by more than half.
    """
    image.load()
    with contextlib.suppress(Exception):    # EXIF that cannot be read: as it lies
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
    there are no classes. portrait: upright pictures are turned to lie.
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
        number = {folder: i for i, folder in enumerate(self.classes)}
        self.labels = [number.get(folder, -1) for folder in first]      # -1: no class
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
        """One file -> RGB picture that covers res, whether it was rotated. Raises what is wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # damage that PIL can live with
            raw = self.bytes(name)
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                if image.info.get("progressive") and raw.count(b"\xff\xda") > 100:
                    raise ValueError("too many scans")          # each takes as long as a picture
                height, width = height_width(self.res)
                side = max(height, width) * 3 // 2              # JPEG: decode what is needed,
                image.draft("RGB", (side, side))                # above 50 dB from all of it
                tile = getattr(image, "tag_v2", {})             # of a TIFF, may exceed the picture
                if max(image.width * image.height,
                       tile.get(322, 0) * tile.get(323, 0)) > MAX_PIXELS:
                    raise ValueError(f"{image.width} x {image.height} pixels are too many")
                image = to_rgb(image)
                rotated = self.portrait and image.height > image.width
                if rotated:
                    image = image.transpose(Image.Transpose.ROTATE_90)
                return cover(image, width, height), rotated

    def picture(self, i):
        """File i -> what is in it, (pixels (H, W, 3) uint8, whether it was rotated, its captions),
        and {} (kept in memory); or None, {name: why} if it is broken.
        """
        if i not in self.cache:
            try:
                image, rotated = self.open(self.names[i])
                pixels = np.asarray(image)
                content = pixels, rotated, self.captions(self.names[i]) if self.tokens else []
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
        height, width = height_width(self.res)
        if content is None:
            content = np.full((height, width, 3), 127, np.uint8), False, []
        pixels, rotated, captions = content
        top = rng.integers(0, pixels.shape[0] - height + 1)
        left = rng.integers(0, pixels.shape[1] - width + 1)
        crop = pixels[top:top + height, left:left + width]
        if self.flip and rng.random() < .5:
            crop = crop[::-1] if rotated else crop[:, ::-1]     # mirrored as it stood
        x = torch.from_numpy(crop.copy()).permute(2, 0, 1)
        tokens = []
        if self.tokens:
            tokens = self.tokens(captions[rng.integers(len(captions))] if captions else "")
        return x, Condition(self.labels[i], int(rotated), tokens), broken
