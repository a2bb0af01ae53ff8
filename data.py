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

import numpy as np
import torch
from PIL import Image, ImageOps

from flowers import Flowers
from listing import OpenZip, list_pictures, list_together, printable, reason
from schedule import height_width
from text import tokenizer
from uvit import Condition

FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]  # by content; no PostScript
CACHE_BYTES = 1 << 28                       # decoded pictures kept in memory, by all processes
MAX_PIXELS, MAX_BYTES = 1 << 26, 1 << 27    # of one picture, of one file: else memory has no bound
CAPTION_BYTES = 1 << 16                     # of a caption file: what comes after them is not read


def load_dataset(config, ranks):
    """Config -> its dataset, on all ranks. Raises ValueError, in one line, if it cannot be read."""
    tokens = tokenizer(config.text, config.text_length) if config.text else None
    if not config.data:
        return Flowers(config.res, config.seed, tokens, config.portrait)

    def pictures(listing):
        return Pictures(config.data, config.res, config.seed, config.flip, tokens, config.portrait,
                        listing)

    def check(listing):
        dataset, count = pictures(listing), len(listing.names)
        if count < config.batch:
            raise ValueError(f"--data {config.data}: {count} pictures are fewer than --batch "
                             f"{config.batch}; add pictures or lower --batch")
        _, _, broken = collate([dataset[n] for n in range(16)])
        if 2 * len(broken) > count:
            raise ValueError(too_many_broken(config.data, broken, count))

    return pictures(list_together(config.data, config.follow_links, config.out, ranks, check))


def too_many_broken(path, broken, count):
    """The line that ends a run; broken: {name: why}."""
    name, why = next(iter(broken.items()))
    return f"--data {path}: more than half cannot be read, {len(broken)} of {count} so far; " \
        f"{printable(name)}: {why}"


def processes():
    """How many processes of this machine load pictures, and share the memory for the cache."""
    loaders = torch.utils.data.get_worker_info()
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * (loaders.num_workers if loaders else 1)


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


class Pictures:
    """The pictures of a Listing, or of a folder or zip that is listed first.

    An epoch is a permutation of all files by (seed, epoch). A file that cannot be read is skipped,
    the next one of the epoch taking its place, and noted in `broken`, {name: why}. Once these are
    more than half of all files, the pictures come out grey: it is for the caller to stop.
    tokens: what makes a caption, a line of the .txt beside the picture, a row of numbers; then
    there are no classes. portrait: upright pictures are turned to lie.
    Raises ValueError if there is nothing to read.
    """

    def __init__(self, path, res, seed=0, flip=True, tokens=None, portrait=False, listing=None):
        self.path, self.res, self.seed, self.flip = str(path), res, seed, flip
        self.tokens, self.portrait = tokens, portrait
        self.listing = listing or list_pictures(self.path)
        self.cache, self.cached, self.zip, self.order = {}, 0, None, (None, None)
        self.broken = {}                    # {name of a file: why}
        self.captioned = int((self.listing.text_of >= 0).sum())
        if tokens and not self.captioned:
            raise ValueError(f"--data {self.path}: no picture has a caption, a .txt beside it")
        self.classes = [] if tokens else self.listing.classes

    names = property(lambda self: self.listing.names)
    unread = property(lambda self: self.listing.unread)
    code = property(lambda self: self.listing.code)

    def __getstate__(self):                 # to a worker process: open files and memory stay here
        return self.__dict__ | dict(zip=None, cache={}, cached=0)

    def bytes(self, i, caption=False, most=MAX_BYTES):
        """What file i holds, or the first `most` bytes of caption file i. Raises ValueError if it
        is unfit.
        """
        name = (self.listing.texts if caption else self.names)[i]
        if self.listing.places is not None:
            if self.zip is None or self.zip[0] != os.getpid():  # a forked worker opens its own
                self.zip = os.getpid(), OpenZip(self.path)
            info = self.listing.zip_info(i + len(self.names) * caption, name)
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
            if size > most and not caption:
                raise ValueError(f"{size} bytes are too many")
            return file.read(min(size, most))

    def captions(self, i):
        """The lines of the .txt beside picture i, [] without one. Raises ValueError if unfit."""
        beside = self.listing.text_of[i]
        try:
            text = self.bytes(beside, True, CAPTION_BYTES) if beside >= 0 else b""
        except Exception as error:          # as a picture's: whatever the disk raises
            raise ValueError(f"its caption {self.listing.texts[beside]}: {reason(error)}")
        lines = text.decode("utf-8-sig", "replace").splitlines()
        return [" ".join(line.split()) for line in lines if line.strip()]

    def open(self, i):
        """File i -> RGB picture that covers res, whether it was rotated. Raises what is wrong."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                     # damage that PIL can live with
            raw = self.bytes(i)
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
            name = self.names[i]
            try:
                image, rotated = self.open(i)
                pixels = np.asarray(image)
                content = pixels, rotated, self.captions(i) if self.tokens else []
            except Exception as error:      # whatever PIL or the disk raises: the run must go on
                self.broken[name] = reason(error)
                return None, {name: reason(error)}
            self.broken.pop(name, None)
            size = pixels.nbytes + sum(map(len, content[2]))
            if not self.all_fit() or self.cached + size > CACHE_BYTES / processes():
                return content, {}
            self.cache[i], self.cached = content, self.cached + size
        return self.cache[i], {}

    def all_fit(self):
        """Whether all pictures fit into the cache; if not, none are kept: it would help little."""
        height, width = height_width(self.res)
        return len(self.names) * height * width * 3 <= CACHE_BYTES / processes()

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.names))
        if self.order[0] != epoch:
            rng = np.random.default_rng((1, self.seed, epoch))
            self.order = epoch, np.arange(len(self.names), dtype=np.int32)
            rng.shuffle(self.order[1])
        rng, broken = np.random.default_rng((2, self.seed, n)), {}
        for k in range(len(self.names)):
            i = int(self.order[1][(place + k) % len(self.names)])
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
        label = -1 if self.tokens else int(self.listing.labels[i])
        return x, Condition(label, int(rotated), tokens), broken
