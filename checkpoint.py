"""Files of a run: always whole when written, never trusted when read.

`write` fills a new file beside its place, flushes it to the disk and renames it. Whoever is killed,
whenever: a reader finds the old file or the new one, never half of one. `read` believes a file only
after its checksums, and never runs what it holds. `carry_over` starts a network from another one's
weights.
"""
import json
import os
import pickle
import re
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

FORMAT = 2                  # of checkpoints and of model.pt; a file of a later one is refused
BEFORE = dict(net="uvit", blocks_16=0, skips="block", text="", text_length=128,
              portrait=False, init="", bias=None)    # what older ones do not say
KEYS = dict(format=int, config=dict, classes=list, step=int, ema=dict)


def write(path, write_to):
    """Let write_to(file) fill a new file, which then replaces `path` in one step.

    Raises OSError (disk full, read-only, gone): `path` is as it was, and nothing is beside it.
    """
    path, part = Path(path), Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
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
    for key, kind in KEYS.items():
        if not isinstance(saved.get(key), kind):
            raise ValueError(f"{path}: not a checkpoint of ours, {key} is missing or wrong")
    saved["config"] = BEFORE | saved["config"]
    return saved


def release(path, out):
    """model.pt or a checkpoint -> a model.pt in bfloat16, half as large, with no word of where it
    was made, but for the name of its T5. Raises ValueError and OSError, as read and write do.
    """
    saved = read(path)
    saved = {key: saved[key] for key in KEYS}
    saved["ema"] = {name: weights.bfloat16() for name, weights in saved["ema"].items()}
    saved["config"] = saved["config"] | dict(data="", out="", init="")
    write(out, lambda file: torch.save(saved, file))


# What classes, the way up and captions add to a network; the part of it by which they are heard.
CONDITIONS = re.compile(r"embedding\.(label|portrait|text)\.|text\.|transformer\.\d+\.2\.")
HEARD_BY = "embedding.label.", "embedding.portrait.", "embedding.text.1."


@torch.no_grad()
def carry_over(first, model, same_classes):
    """A trained network -> its weights into `model`, for another size, other classes or captions.

    Not in the paper. The coarse bands of the wavelet, which are the first channels, keep their
    weights; finer bands that are new enter the channels that were there with zero weights. A
    position keeps its distance from the middle, in shorter sides of the map. Conditions that are
    new, other classes too, start unheard (HEARD_BY is zero); of a class or way up that is gone the
    null row is added to the clock's bias.
    Raises ValueError if it is another network, or its top level a wider one.
    """
    weights, own = first.state_dict(), model.state_dict()       # own shares the model's memory
    kept = dict(label=same_classes, portrait=True)
    for table, nothing_said in dict(label=-1, portrait=0).items():
        name = f"embedding.{table}.weight"
        if name in weights and not (name in own and kept[table]):
            bias = weights["embedding.linear_out.bias"]
            weights["embedding.linear_out.bias"] = bias + weights.pop(name)[nothing_said]
    last = len(model.up) - 1
    top = re.compile(rf"project_|norm_out\.|(down|pool)\.0\.|(up|unpool)\.{last}\.")
    room = len(model.norm_out.weight) >= len(first.norm_out.weight)
    for name in sorted(own.keys() | weights.keys()):
        new, old = own.get(name), weights.get(name)
        if (new is None or old is None) and CONDITIONS.match(name):
            if name.startswith(HEARD_BY) and old is None:
                new.zero_()
            continue
        shapes = [list(part.shape) if part is not None else "none" for part in (old, new)]
        if shapes[0] == shapes[1]:
            new.copy_(old)
        elif name == "position" and shapes[0][1] == shapes[1][1]:
            (H, W), (h, w) = new.shape[2:], old.shape[2:]
            y, x = ((torch.arange(n) + .5 - n / 2) * 2 / m * min(h, w) / min(H, W)
                    for n, m in ((H, h), (W, w)))       # the old map spans [-1, 1]
            at = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[None]     # (1, H, W, 2)
            new.copy_(F.grid_sample(old, at, padding_mode="border", align_corners=False))
        elif room and "none" not in shapes and top.match(name) and shapes[0][2:] == shapes[1][2:]:
            if ".film." in name:                # scales, then shifts
                new, old = (part.unflatten(0, (2, -1)).transpose(0, 1) for part in (new, old))
            corner = tuple(slice(min(sizes)) for sizes in zip(new.shape, old.shape))
            new[corner[0]] = 0                  # what was there does not hear what is new
            new[corner] = old[corner]
        else:
            raise ValueError(f"another network, {name} is {shapes[0]} there, {shapes[1]} here: it "
                             "takes the same --model, --net, --patch, --skips, --blocks-16, --text "
                             "and --text-length, and a --res with as many halvings between the "
                             "network's top and bottom, the top no narrower")


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


if __name__ == "__main__":                  # python checkpoint.py runs/NAME/model.pt OUT
    try:
        _, model, out = sys.argv
        release(model, out)
        print(f"{out}, {os.path.getsize(out) / 1e6:.1f} MB")
    except (ValueError, OSError) as error:
        print(error if len(sys.argv) == 3 else "usage: checkpoint.py MODEL OUT", file=sys.stderr)
        sys.exit(2)
