"""Files: complete when written, checked when read; networks from files.

`write` fills a new file beside its place, flushes it to the disk and renames it. Whenever a process
is killed, a reader finds the old file or the new one, never half of one. `read` checks a file's
checksums first and never runs code from it. Both raise; train.py and sample.py say it in a line.

A checkpoint is a dict: format, config (the settings of the run), network (the numbers that define
the network), classes (names), step, ema (weights by name), and what else is needed to go on:
model, optimizer, pictures, names, seconds, skipped, at_a_time. model.pt is the first six of these.
"""
import errno
import io
import json
import mmap
import os
import pickle
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows
    fcntl = None

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
import torch.nn.functional as F
from PIL import Image

from schedule import height_width, logsnr_schedule
from sid2 import ResidualUViT
from text import text_encoder
from unet import UNet
from uvit import UViT

FORMAT = 3                  # of checkpoints and of model.pt; a file of a later one is refused
KEYS = dict(format=int, config=dict, network=dict, classes=list, step=int, ema=dict)


# ---------------------------------------------------------------------------- files

class Uncached(io.RawIOBase):
    """A new file, written past the system's page cache where Linux can (O_DIRECT).

    In the cache a checkpoint takes the place of the pictures to learn, and up to two seconds of
    processor time per GB from the training.
    """

    def __init__(self, path):
        self.block, self.filled = mmap.mmap(-1, 2**23), 0       # O_DIRECT: from whole pages
        self.raw = open(path, "wb", buffering=0)
        self.direct = self.set_direct(True)

    def set_direct(self, direct):
        """-> whether the file is written past the cache now."""
        try:
            flags = fcntl.fcntl(self.raw, fcntl.F_GETFL) & ~os.O_DIRECT
            fcntl.fcntl(self.raw, fcntl.F_SETFL, flags | os.O_DIRECT * direct)
            return direct
        except (OSError, AttributeError):   # this disk, or this system, has no such thing
            return False

    def write(self, data):
        rest = data = memoryview(data).cast("B")
        while rest:
            part = rest[:len(self.block) - self.filled]
            self.block[self.filled:self.filled + len(part)] = part
            self.filled, rest = self.filled + len(part), rest[len(part):]
            if self.filled == len(self.block):
                self.flush()
        return len(data)

    def flush(self):
        rest, self.filled = memoryview(self.block)[:self.filled], 0
        while rest:
            try:
                rest = rest[self.raw.write(rest):]
            except OSError as error:
                if error.errno != errno.EINVAL or not self.direct:
                    raise
                self.direct = self.set_direct(False)            # the end is no whole page

    def fileno(self):
        return self.raw.fileno()

    def close(self):
        try:
            super().close()                 # flushes
        finally:
            self.raw.close()


def write(path, write_to, opener=partial(open, mode="wb")):
    """Let write_to(file) fill a new file, which then replaces `path` in one step.

    Raises OSError (disk full, read-only, gone): `path` is as it was, and nothing is beside it.
    """
    path, part = Path(path), Path(f"{path}.part")
    try:
        with opener(part) as file:
            write_to(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        if os.name == "posix":              # the new name, too, is to outlive a power cut
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            except OSError:                 # some file systems cannot
                pass
            os.close(folder)
    except BaseException as error:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            pass                            # the folder itself is gone or read-only
        cause = error                       # torch.save hides the disk's own words
        while cause and not isinstance(cause, OSError):
            cause = cause.__context__
        raise cause or error


def host_copy(tree, before=None):
    """A nested dict -> the same with its tensors copied to this machine's memory.

    before: an earlier copy, whose tensors are filled again where they have the right shape. Copies
    from a GPU are pinned, which is faster, and complete on return.
    """
    def copy(tree, before):
        if isinstance(tree, dict):
            before = before if isinstance(before, dict) else {}
            return {name: copy(part, before.get(name)) for name, part in tree.items()}
        if not isinstance(tree, torch.Tensor):
            return tree
        if before is None or before.shape != tree.shape:
            try:
                before = torch.empty(tree.shape, dtype=tree.dtype, pin_memory=tree.is_cuda)
            except RuntimeError:            # no more memory may be pinned
                before = torch.empty(tree.shape, dtype=tree.dtype)
        return before.copy_(tree, non_blocking=tree.is_cuda)

    copied = copy(tree, before)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def read(path):
    """A checkpoint or model.pt -> its dict (KEYS). Raises ValueError, one line that says why."""
    if os.path.exists(path) and not os.path.isfile(path):       # a pipe would wait for ever
        raise ValueError(f"{path}: {'Is a directory' if os.path.isdir(path) else 'not a file'}")
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(info.compress_type for info in archive.infolist())
            damaged = archive.testzip()     # torch writes checksums, but does not look at them
    except (FileNotFoundError, PermissionError) as error:
        raise ValueError(f"{path}: {error.strerror}")
    except Exception:
        raise ValueError(f"{path}: not a checkpoint, or cut short or damaged")
    if compressed or damaged:
        raise ValueError(f"{path}: damaged, {damaged or 'it'} is not what was written")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: refused, for it holds more than tensors and plain values")
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint ({type(error).__name__})")
    if not isinstance(saved, dict) or not isinstance(saved.get("format"), int):
        raise ValueError(f"{path}: not a checkpoint of ours, it names no format")
    if saved["format"] > FORMAT:
        raise ValueError(f"{path}: format {saved['format']} is of a newer version of this code, "
                         f"which knows {FORMAT}: update the code")
    try:
        saved = upgraded(saved) if saved["format"] < 3 else saved
    except Exception as error:
        raise ValueError(f"{path}: not a checkpoint of ours ({type(error).__name__}: {error})")
    for key, kind in KEYS.items():
        if not isinstance(saved.get(key), kind):
            raise ValueError(f"{path}: not a checkpoint of ours, {key} is missing or wrong")
    saved["config"] = dict(optimizer="adam", decay=0.0) | saved["config"]   # in older files neither
    return saved


# ---------------------------------------------------------------------------- networks

def build_network(architecture="uvit", skips="block", text="", text_length=0, text_width=0,
                  download=True, **shape):
    """The network of a checkpoint's `network`. shape: arguments of UViT, or of UNet.

    download: whether a T5 may come from the network. Raises ValueError if it cannot be read, or
    if there are so many blocks that a damaged file must have asked for them.
    """
    if max(shape.get("depth", 0), shape.get("blocks_16", 0), *shape.get("blocks", (0,))) > 1000:
        raise ValueError("more than 1,000 blocks")
    if architecture == "unet":
        return UNet(**shape)
    encoder = text_encoder(text, text_length, text_width, download)
    return (ResidualUViT if skips == "level" else UViT)(**shape, text=encoder)


class NoInitialWeights(TorchFunctionMode):
    """Saves a second: on the meta device, random initial weights would load torch's compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.nn.init.normal_ and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        if function is torch.Tensor.mul and args[0].is_meta:
            return args[0]
        return (torch.empty if function is torch.randn else function)(*args, **kwargs)


def load_model(path, device):
    """model.pt -> network with its EMA weights, and the dict of the file. Raises ValueError."""
    saved = read(path)
    config, network = saved["config"], saved["network"]
    if "position_init" in network:
        network = network | {"position_init": "gauss"}          # the weights replace it
    try:
        with torch.device("meta"), NoInitialWeights():      # no memory, whatever the file claims
            model = build_network(**network, download=False)
        model.load_state_dict(saved["ema"], assign=True)
        schedule = logsnr_schedule(config["schedule"], config["res"], config["noise_d"])
        assert schedule(torch.rand(2)).isfinite().all()
        assert len(saved["classes"]) == saved["network"]["classes"]
        for name in ("res", "portrait", "text", "text_length"):     # sample.py goes by the settings
            assert saved["network"].get(name, config[name]) == config[name]
        assert all(isinstance(name, str) for name in saved["classes"])
        assert all(p.is_floating_point() and p.isfinite().all() for p in model.parameters())
    except Exception as error:
        if str(error).startswith("t5:"):
            raise
        raise ValueError(f"{path}: its weights are not those of the network it describes")
    # Its weights take gradients: of those alone autocast keeps the cast to bfloat16.
    return model.to(device, torch.float32).eval(), saved


def newest_model(with_text):
    """The newest model.pt in runs/, else bundled weights -> its path, and which of these it is."""
    runs = list(filter(os.path.isfile, Path("runs").glob("*/model.pt")))
    if runs:
        return max(runs, key=os.path.getmtime), "the newest in runs/"
    bundled = "words.pt" if with_text else "photos.pt"
    return Path(__file__).parent / "assets" / bundled, "the bundled weights"


CONDITIONING = "embedding.label.", "embedding.portrait.", "embedding.text.", "text."


@torch.no_grad()
def copy_weights(source, target, same_classes):
    """Copy the weights of a trained network into a new one of the same trunk (--init).

    Not in the paper. Equal shapes are copied, but for the embedding of other classes. The first and
    last layer keep the channels of the coarse bands, those of new, finer bands start at zero.
    Positions are interpolated. Conditioning that is new or of another size starts anew. Raises
    ValueError, which names the weights, on any other difference.
    """
    old, new = source.state_dict(), target.state_dict()         # new shares the memory of target
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        shapes = [list(weights.shape) if weights is not None else None for weights in (a, b)]
        cross_attention = name.startswith("transformer.") and name.split(".")[2] == "2"
        if name.startswith(CONDITIONING) or cross_attention:
            keep = shapes[0] == shapes[1] and (same_classes or "label" not in name)
            if keep:
                b.copy_(a)
        elif shapes[0] == shapes[1]:
            b.copy_(a)
        elif name == "position" and shapes[0][1] == shapes[1][1]:
            b.copy_(F.interpolate(a, b.shape[2:], mode="bilinear"))
        elif name.startswith(("project_in.", "project_out.")) and shapes[0][2:] == shapes[1][2:] \
                and all(before <= now for before, now in zip(*shapes)):
            b.zero_()
            b[tuple(map(slice, a.shape))] = a
        else:
            raise ValueError(f"another trunk, {name} is {shapes[0]} there, {shapes[1]} here: it "
                             "takes the same --model and settings of the network, as wide a "
                             "largest map, and as many halvings from it to the smallest")


def release(path, out):
    """model.pt or a checkpoint -> a model.pt in bfloat16, half as large, without file names but
    for that of its T5. Raises ValueError and OSError, as read and write do.
    """
    saved = read(path)
    saved = {key: saved[key] for key in KEYS}
    saved["ema"] = {name: weights.bfloat16() for name, weights in saved["ema"].items()}
    saved["config"] = saved["config"] | dict(data="", out="", init="")
    write(out, lambda file: torch.save(saved, file))


# ---------------------------------------------------------------------------- older files

# What the names of models meant before files held the numbers (formats 1 and 2).
OLD_MODELS = dict(
    tiny=((16, 16, 48, 128), (1, 1, 1), 4, 64, 256, 0.0, "sines"),
    mini=((32, 64, 96, 192), (1, 1, 2), 8, 64, 192, 0.0, "sines"),
    small=((64, 96, 192, 512), (2, 2, 2), 8, 64, 512, 0.1, "gauss"),
    base=((128, 192, 384, 1024), (2, 2, 2), 16, 64, 1024, 0.1, "gauss"),
    paper=((128, 256, 512, 2048), (2, 2, 2), 36, 128, 1024, 0.2, "gauss"))
OLD_DEFAULTS = dict(net="uvit", blocks_16=0, skips="block", text="", text_length=128,
                    portrait=False, init="", bias=None)
OLD_NONE = dict(blocks_16=0, dropout=-1, accum=0, workers=-1)       # what stood for None
ON_OFF = {"on": True, "off": False, "": None}


def upgraded(saved):
    """A file of format 1 or 2 -> the same in format 3. Raises KeyError and the like."""
    config = OLD_DEFAULTS | saved["config"]
    config.pop("memory_budget", None)
    config["architecture"] = config.pop("net")
    for name, value in OLD_NONE.items():
        config[name] = None if config.get(name, value) == value else config[name]
    for name in ("multiscale", "compile", "bf16"):
        config[name] = ON_OFF[config[name]]
    widths, blocks, depth, head_dim, emb_dim, dropout, position_init = OLD_MODELS[config["model"]]
    network = dict(architecture=config["architecture"], res=config["res"], head_dim=head_dim,
                   emb_dim=emb_dim, classes=len(saved["classes"]),
                   **{name: config[name] for name in ("patch", "dropout_res", "portrait")})
    if config["architecture"] == "unet":
        network |= dict(channels=widths[0], blocks_16=config["blocks_16"] or 12)
        dropout = min(.1, dropout)
    else:
        network |= dict(widths=widths, blocks=blocks, depth=config["blocks_16"] or depth,
                        position_init=position_init, text_width=emb_dim // 2,
                        **{name: config[name] for name in ("skips", "text", "text_length")})
    network["dropout"] = dropout if config["dropout"] is None else config["dropout"]
    renamed = {part: {name.replace("unpool.", "upsample."): weights
                      for name, weights in saved[part].items()}
               for part in ("ema", "model") if part in saved}
    return saved | renamed | dict(format=FORMAT, config=config, network=network)


# ---------------------------------------------------------------------------- locks and logs

def lock(path, patience=60):
    """Open `path` to append, for this process alone until it ends -> file, unbuffered.

    A process that was told to stop gets `patience` seconds to do so. Raises BlockingIOError.
    """
    file = open(path, "ab", buffering=0)
    try:
        import fcntl
    except ImportError:                     # Windows: no such lock
        return file
    for second in range(patience + 1):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if second == patience:
                file.close()
                raise
            if second == 0:
                print(f"waiting for another process to leave {path}", flush=True)
            time.sleep(1)
        except OSError:                     # a file system without locks
            return file


def append(file, line):
    """One whole line, or none: what a full disk cut short is taken back. Raises OSError."""
    end, line = file.seek(0, os.SEEK_END), line.encode() + b"\n"
    try:
        while line:
            line = line[file.write(line):]
    except OSError:
        file.truncate(end)
        raise


def trim(file, step):
    """Forget the lines of a log after `step`, and one that was cut short: they happen again."""
    end = 0
    for line in open(file.name, "rb"):
        try:
            if json.loads(line)["step"] > step or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError, TypeError):
            break
        end += len(line)
    file.truncate(end)


# ---------------------------------------------------------------------------- samples

class SampleFolder:
    """Where sample.py writes: one PNG per picture, samples.npz for evaluators of FID, grid.png.

    settings.json holds what was asked for, so that the same command goes on where it stopped:

        the same settings       finished pictures stay
        others, in samples/     its pictures are removed
        others, in an --out     refused, as is a folder with pictures but without settings.json
    """

    BEFORE = dict(between=None, guidance_interval=[-99, 99], portrait=False, schedule=None,
                  spacing="t")              # of older files

    def __init__(self, options, res, ckpt, ranks):
        self.out, self.named = Path(options.out or "samples"), bool(options.out)
        self.res, self.count, self.film, self.ranks = res, options.n, options.film, ranks
        self.size = height_width(res)[::1 if options.portrait else -1]         # width, height
        checksums = [info.CRC for info in zipfile.ZipFile(ckpt).infolist()]
        self.settings = vars(options) | dict(
            ckpt=f"{zlib.crc32(repr(checksums).encode()):08x}", out="",
            device=ranks.device.type,
            guidance_interval=list(options.guidance_interval or self.BEFORE["guidance_interval"]),
            prompt=options.prompt or None, prompts=options.prompts or None)
        del self.settings["compile"], self.settings["film"]     # they change nothing in a picture

    def start_or_continue(self):
        """Lock the folder, made if need be, and meet the other ranks. Raises ValueError."""
        trouble = self.open_here() if self.ranks.is_first else None
        if self.ranks.distributed:
            self.ranks.join(timeout=7 * 24 * 60)    # minutes: one may have much left to draw
        trouble = self.ranks.from_first(trouble)
        if trouble:
            raise ValueError(trouble)

    def open_here(self):
        """-> None, or why the folder cannot be used."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.out / "settings.json")
            text = (self.out / "settings.json").read_text()
            if not text:
                foreign = next(self.out.glob("[0-9]*.png"), None)
                if foreign:
                    (self.out / "settings.json").unlink()
                    return f"--out {self.out}: holds other pictures ({foreign.name}): name " \
                        "another folder"
            before = self.BEFORE | json.loads(text or "{}")
            differ = [name for name, value in self.settings.items() if before.get(name) != value]
            if text and differ and self.named:
                name = differ[0]
                why = {"ckpt": "of another model", "spacing": "drawn by an earlier version"}.get(
                    name, f"--{name.replace('_', '-')} {before.get(name)}, now "
                    f"{self.settings[name]}")
                return f"--out {self.out}: holds other pictures ({why}): name another folder"
            if differ:
                self.start_over()
            names = [f"{i:06d}.png" for i in range(self.count)]
            for name in ["samples.npz", "grid.png", "film.png", "film.webp", *names]:
                (self.out / f"{name}.part").unlink(missing_ok=True)     # of a killed command
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            return f"--out {self.out}: cannot be used ({error}): name another folder"

    def start_over(self):
        for old in [*self.out.glob("[0-9]" * 6 + "*.png"), self.out / "samples.npz",
                    *(self.out / name for name in ("grid.png", "film.png", "film.webp"))]:
            old.unlink(missing_ok=True)
        self.lock.truncate(0)
        self.lock.write(json.dumps(self.settings).encode())

    def has(self, numbers):
        """Whether these pictures, and the film of the first one, are finished."""
        try:
            for i in numbers:
                with Image.open(self.out / f"{i:06d}.png") as image:
                    if image.size != self.size:
                        return False
        except OSError:
            return False
        return not self.film or 0 not in numbers or (self.out / "film.webp").exists()

    def save(self, name, image):
        write(self.out / name, lambda file: image.save(file, "PNG"))

    def save_moving(self, name, frames):
        """An animated WEBP of frames (H, W, 3), enlarged to 256 pixels or more."""
        factor = -(-256 // max(frames[0].shape))
        images = [Image.fromarray(f).resize((f.shape[1] * factor, f.shape[0] * factor),
                                            Image.Resampling.NEAREST) for f in frames]
        durations = [80] * (len(images) - 1) + [2000]           # milliseconds
        write(self.out / name, lambda file: images[0].save(
            file, "WEBP", save_all=True, append_images=images[1:], duration=durations, loop=0,
            lossless=True))

    def read(self, i):
        return np.asarray(Image.open(self.out / f"{i:06d}.png"))

    def save_npz(self):
        """arr_0 (N, H, W, 3) uint8, written picture by picture. The folder is finished then."""
        header = dict(descr="|u1", fortran_order=False, shape=(self.count, *self.read(0).shape))

        def fill(file):
            with zipfile.ZipFile(file, "w") as archive:
                with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                    np.lib.format.write_array_header_1_0(array, header)
                    for i in range(self.count):
                        array.write(self.read(i).tobytes())

        write(self.out / "samples.npz", fill)
        self.lock.close()


if __name__ == "__main__":                  # python checkpoint.py runs/NAME/model.pt OUT
    try:
        _, model, out = sys.argv
        release(model, out)
        print(f"{out}, {os.path.getsize(out) / 1e6:.1f} MB")
    except (ValueError, OSError) as error:
        print(error if len(sys.argv) == 3 else "usage: checkpoint.py MODEL OUT", file=sys.stderr)
        sys.exit(2)
