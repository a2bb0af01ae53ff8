"""Which pictures there are: a folder or zip, listed once for all processes of a run.

A Listing is a few arrays, which all ranks and loaders of a machine share: the first rank of each
machine, number N, writes them to `listing-N.pt` in the folder of the run, and all map that file
into memory. The million names of ImageNet take 59 MB so, and 120 MB with their places in a zip.
"""
import contextlib
import ctypes
import hashlib
import os
import time
import zipfile
import zlib
from array import array
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path

import numpy as np
import torch

from checkpoint import write

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
VERSION = 1                                 # of the file; one of another version is written anew
AGREED = "names", "ends", "labels", "texts", "text_ends", "text_of"     # by all machines of a run


def printable(text):
    """One line for a terminal, whatever a file is named: é stays, line breaks become \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text)


def reason(error):
    return f"{type(error).__name__}: {printable(str(error))}"[:200]


class Names(Sequence):
    """Strings in one array of bytes; ends: where each of them ends, after a first 0."""

    def __init__(self, bytes_of_all, ends):
        self.bytes_of_all, self.ends = bytes_of_all, ends

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        name = self.bytes_of_all[self.ends[i]:self.ends[i + 1]]
        return name.tobytes().decode("utf-8", "surrogatepass")


class Listing:
    """The pictures of a folder or zip, in the order of their names.

    names, labels       of the pictures; label -1: in no class
    texts, text_of      caption files; which of them is a picture's, -1 for none
    places              of pictures, then captions, in a zip; None: a folder
    classes             names of the first-level folders
    unread              {folder: why it was not read}
    code                a number that other names would change, whatever their folders
    digest              of all names, labels and captions
    """

    def __init__(self, arrays, about, file=None):
        self.arrays, self.about, self.file = arrays, about, file
        self.names = Names(arrays["names"], arrays["ends"])
        self.texts = Names(arrays["texts"], arrays["text_ends"])
        self.labels, self.text_of = arrays["labels"], arrays["text_of"]
        self.places = arrays.get("places")
        self.classes, self.unread = about["classes"], about["unread"]
        self.code, self.digest = about["code"], about["digest"]

    def __reduce__(self):                   # to a loader process, which maps the file again
        return (load, (self.file, self.digest)) if self.file else \
            (Listing, (self.arrays, self.about))

    def zip_info(self, number, name):
        """What zipfile needs to read file `number` of a zip; captions come after all pictures."""
        info = zipfile.ZipInfo(name)
        for field, value in zip(PLACE, self.places[number].tolist()):
            setattr(info, field, value)
        info.orig_filename = self.about.get("originals", {}).get(name, name)
        return info

    def only(self, kept):
        """The same with only these pictures."""
        lines = [(self.names[i], self.labels[i], self.text_of[i]) for i in kept]
        places = None
        if self.places is not None:
            places = np.concatenate([self.places[kept], self.places[len(self.names):]])
        some = build(lines, list(self.texts), self.classes, self.unread, places)
        some.about["originals"] = self.about.get("originals", {})
        return some


PLACE = "header_offset", "compress_type", "flag_bits", "CRC", "compress_size", "file_size"


class OpenZip(zipfile.ZipFile):
    """A zip whose directory is not read, as it is known: that of a million files takes 10 s."""

    def _RealGetContents(self):
        pass


# ---------------------------------------------------------------------------- listing

def build(lines, texts, classes, unread, places=None):
    """lines: (name, number of its class, of its caption file) of each picture -> Listing.

    Numbers are -1 for none. classes, texts: names, which may be added while lines are read.
    """
    names, ends, labels, text_of, code = bytearray(), array("q", [0]), array("i"), array("i"), 0
    for name, label, text in lines:
        encoded = name.encode("utf-8", "surrogatepass")
        code = zlib.crc32(b"\n" * (len(names) > 0) + encoded.rpartition(b"/")[2], code)
        names += encoded
        ends.append(len(names))
        labels.append(label)
        text_of.append(text)
    by_name = {name: i for i, name in enumerate(sorted(classes))}
    labels = np.array([*map(by_name.get, classes), -1], np.int32)[np.asarray(labels)]
    classes = list(by_name)
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    arrays = dict(names=np.array(names, np.uint8), ends=np.asarray(ends),
                  labels=labels, text_of=np.asarray(text_of),
                  texts=np.array(bytearray(b"".join(encoded)), np.uint8),
                  text_ends=np.cumsum([0, *map(len, encoded)]))
    digest = hashlib.sha256(repr(classes).encode("utf-8", "surrogatepass"))
    for part in AGREED:
        digest.update(arrays[part])
    if places is not None:
        arrays["places"] = places
    return Listing(arrays, dict(classes=classes, unread=unread, code=code,
                                digest=digest.hexdigest()))


def told(names, path):
    """The names, with a line now and then of how many there were."""
    clock = time.monotonic() + 5
    for count, name in enumerate(names):
        if count % 1000 == 0 and time.monotonic() > clock:
            print(f"listing {path}: {count:,} pictures so far", flush=True)
            clock = time.monotonic() + 5
        yield name


def list_folder(path, follow_links=False):
    """A folder, with all below it -> Listing."""
    texts, unread, classes = [], {}, []
    root = os.path.realpath(path)

    def leads_out(entry):
        if follow_links or not entry.is_symlink():
            return False
        target = os.path.realpath(entry.path)
        return target != root and not target.startswith(root.rstrip(os.sep) + os.sep)

    def is_folder(entry):
        return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()

    def walk(folder, prefix, seen):
        """Yields (name, caption file) of its pictures, by name, and so on below."""
        real = os.path.realpath(folder)
        if real in seen:                    # a link in a circle, or a second one to the same folder
            return
        seen.add(real)
        try:
            with os.scandir(folder) as entries:
                # With a slash after folders this is the order of the whole names.
                found = [(entry.name + "/" * is_folder(entry), entry.path, leads_out(entry))
                         for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            unread[prefix.rstrip("/") or "."] = reason(error)
            return
        lost = [name for name, _, out in found if out and (
            name[-1] == "/" or os.path.splitext(name)[1].lower() in ENDINGS)]
        if lost:
            unread[prefix.rstrip("/") or "."] = f"{len(lost)} links out of the folder are not " \
                "followed without --set follow_links=on"
        found = sorted((name, path) for name, path, out in found if not out)
        beside = {os.path.splitext(name)[0]: name for name, _ in found
                  if name.lower().endswith(".txt")}
        for name, below in found:
            stem, ending = os.path.splitext(name)
            if name[-1] == "/":
                yield from walk(below, prefix + name, seen)
            elif ending.lower() in ENDINGS:
                yield prefix + name, prefix + beside[stem] if stem in beside else None

    def lines():
        for name, text in told(walk(str(path), "", set()), path):
            label = -1
            if "/" in name:
                first = name[:name.index("/")]
                if classes[-1:] != [first]:     # names come in order: those of a class together
                    classes.append(first)
                label = len(classes) - 1
            if text is not None:
                texts.append(text)
            yield name, label, len(texts) - 1 if text is not None else -1

    return build(lines(), texts, classes, unread)


def list_zip(path):
    """A .zip -> Listing. Raises whatever a damaged one brings up."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError("not a file")
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}

    def folders(name):
        return [part for part in name.split("/")[:-1] if part not in ("", ".", "..")]

    def is_picture(name):
        hidden = any(part.startswith((".", "__MACOSX")) for part in name.split("/")
                     if part not in (".", ".."))
        return os.path.splitext(name)[1].lower() in ENDINGS and not hidden

    names = sorted(filter(is_picture, infos))
    texts = sorted(name for name in infos if name.lower().endswith(".txt"))
    beside = {os.path.splitext(name)[0]: i for i, name in enumerate(texts)}
    # A zip of one folder is that folder: what all names begin with says nothing.
    common = folders(names[0]) if names else []
    for name in names:
        while folders(name)[:len(common)] != common:
            common.pop()
    classes, number = [], {}

    def lines():
        for name in told(names, path):
            first = folders(name)[len(common):len(common) + 1]
            if first and first[0] not in number:
                number[first[0]] = len(classes)
                classes.append(first[0])
            yield name, number[first[0]] if first else -1, beside.get(os.path.splitext(name)[0], -1)

    listing = build(lines(), texts, classes, {})
    numbers, place = array("q"), attrgetter(*PLACE)
    for name in [*names, *texts]:
        numbers.extend(place(infos[name]))
    listing.places = listing.arrays["places"] = np.asarray(numbers).reshape(-1, len(PLACE))
    listing.about["originals"] = {name: info.orig_filename for name, info in infos.items()
                                  if info.orig_filename != name}
    return listing


def list_pictures(path, follow_links=False):
    """A folder or .zip -> Listing. Raises ValueError, in one line, if there is nothing to read."""
    try:
        listing = list_folder(path, follow_links) if os.path.isdir(path) else list_zip(path)
    except FileNotFoundError:
        raise ValueError(f"--data {path}: no such folder or .zip")
    except Exception as error:              # whatever a damaged zip, or one that is none, brings up
        raise ValueError(f"--data {path}: neither a folder nor a .zip that can be read "
                         f"({printable(str(error))})")
    if not listing.names:
        why = "; ".join(listing.unread.values()) or " ".join(sorted(ENDINGS))
        raise ValueError(f"--data {path}: no picture there ({why})")
    return listing


# ---------------------------------------------------------------------------- once for a run

def save(listing, file, stamp=None):
    """A Listing to a file that `load` maps into memory; stamp: of its zip. Raises OSError."""
    arrays = {name: torch.from_numpy(part) for name, part in listing.arrays.items()}
    content = dict(version=VERSION, arrays=arrays, about=listing.about, zip=stamp)
    write(file, lambda out: torch.save(content, out))


def load(file, digest):
    """A Listing from a file, mapped into memory. Raises anything if it is not the one expected."""
    content = torch.load(file, mmap=True, weights_only=True)
    arrays = {name: part.numpy() for name, part in content["arrays"].items()}
    assert content["version"] == VERSION and content["about"]["digest"] == digest
    return Listing(arrays, content["about"], file)


def stamp_of(path):
    """Of a zip its path, size and time, which change if it does; None of a folder."""
    if os.path.isdir(path) or not os.path.exists(path):
        return None
    status = os.stat(path)
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]


def listed_before(file, stamp):
    """The Listing in a file, if it is whole and of this zip as it is now; else None."""
    try:
        with zipfile.ZipFile(file) as whole:
            content = torch.load(file, mmap=True, weights_only=True)
            if stamp is None or content["zip"] != stamp or whole.testzip():
                return None
        return load(file, content["about"]["digest"])
    except Exception:                       # none there, or damaged
        return None


def list_together(path, follow_links, out, ranks, check=lambda listing: None):
    """The same Listing on all ranks: one of each machine lists the pictures, the others map them.

    Raises ValueError on all ranks if one cannot read them, or has others than the first rank, or
    if check(listing) does.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    file, stamp = Path(out, f"listing-{ranks.rank - local_rank}.pt"), stamp_of(path)
    mine = trouble = None

    def list_here():
        nonlocal mine, trouble
        try:
            mine = listed_before(file, stamp) or list_pictures(path, follow_links)
            check(mine)
        except ValueError as error:
            trouble = str(error)

    def agree():
        """-> the digest that all have, who have listed by now."""
        every = ranks.gather((mine and mine.digest, trouble))
        wrong = next((words for _, words in every if words), None)
        if wrong:
            raise ValueError(wrong)
        digests = {digest for digest, _ in every} - {None}
        if len(digests) > 1:
            raise ValueError(first_difference(path, mine, ranks))
        return digests.pop()

    if local_rank == 0:
        list_here()
    digest = agree()
    if mine and not mine.file:
        mine = saved_or_not(mine, file, stamp)
        with contextlib.suppress(Exception):        # glibc: give what listing took back at once
            ctypes.CDLL(None).malloc_trim(0)
    ranks.gather(None)                      # now the files are there
    if not mine:
        try:
            mine = load(file, digest)
        except Exception:                   # it could not be written: each rank for itself
            list_here()
    agree()
    return mine


def saved_or_not(listing, file, stamp):
    """Save it, if that file is not the same already -> the Listing in the file; else as it was."""
    out = file.parent
    try:
        if stamp is None and file.exists():
            with contextlib.suppress(Exception):
                return load(file, listing.digest)
        inside = os.listdir(out) if out.exists() else []
        ours = [name for name in inside if name == "log.jsonl" or name.startswith("listing-")]
        if inside and not ours:             # a folder that is not of a run: `Run` will say so
            return listing
        out.mkdir(parents=True, exist_ok=True)
        save(listing, file, stamp)
        return load(file, listing.digest)
    except Exception:                       # no room, no right: then without
        return listing


def first_difference(path, mine, ranks):
    """A line that names a picture that one machine has and the first one has not, or otherwise."""
    digest, names = ranks.from_first(mine and (mine.digest, list(mine.names)))
    line = None
    if mine and mine.digest != digest:
        here, there = set(mine.names), set(names)
        us, first = (f"rank {rank} on {ranks.hosts[rank]}" for rank in (ranks.rank, 0))
        has, lacks = (us, first) if here - there else (first, us)
        name = min(here - there or there - here, default=None)
        line = f"pictures of {first} and of {us} have other captions" if name is None else \
            f"{printable(name)} is there for {has}, but not for {lacks}"
    return f"--data {path}: " + next(line for line in ranks.gather(line) if line)
