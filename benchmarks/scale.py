"""Do 64 ranks of a run with 1.28 M pictures agree? Each is simulated by a process of its own.

    python benchmarks/scale.py                  64 ranks and 1,281,167 names, two minutes
    python benchmarks/scale.py --pictures 1000 --ranks 4

Every process maps one listing and computes, as in training, the permutations of two epochs and, for
a step at the end of the first epoch, which pictures it learns, with what t and noise. The same step
by one rank says what these must be.
"""
import argparse
import hashlib
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import listing                                                      # noqa: E402
from config import Config                                                   # noqa: E402
from data import Pictures                                                   # noqa: E402
from noise import draw_noise                                                # noqa: E402
from run import Run                                                         # noqa: E402

BATCH, SEED, RES = 256, 7, 64


def names(count):
    """As ImageNet names its pictures: 1,000 folders, in order."""
    folders = min(1000, count)
    classes = [f"n{k:08d}" for k in range(folders)]
    each = [count // folders + (k < count % folders) for k in range(folders)]
    return classes, ((f"{name}/{name}_{i:05d}.JPEG", k, -1)
                     for k, name in enumerate(classes) for i in range(each[k]))


def private_memory():
    """Bytes of this process alone, in MB (Linux)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def simulated_rank(file, digest, rank, world):
    """-> hash of two epochs' orders, {number: (name, hash of its t, u, noise)}, seconds, MB."""
    torch.set_num_threads(1)
    before, start = private_memory(), time.perf_counter()
    pictures = Pictures("", RES, SEED, listing=listing.load(file, digest))
    seconds, orders, learned = time.perf_counter() - start, hashlib.sha256(), {}
    pictures.picture = lambda i: ((blank, False, []), seen.append(pictures.names[i]) or {})
    blank, count = torch.zeros(RES, RES, 3, dtype=torch.uint8).numpy(), len(pictures.names)
    share = SimpleNamespace(share=BATCH // world, num_parts=1, config=Config(batch=BATCH),
                            ranks=SimpleNamespace(rank=rank, world=world))
    for epoch in (0, 1):
        seen = []
        pictures[epoch * count]
        orders.update(pictures.order[1].tobytes())
    numbers = Run.picture_numbers(share, count // BATCH, 0)     # across the end of an epoch
    t, eps, u = draw_noise(SEED, numbers, RES, "cpu")
    for i, number in enumerate(numbers):
        seen = []
        pictures[number]
        drawn = b"".join(part[i].numpy().tobytes() for part in (t, eps, u))
        learned[number] = *seen, hashlib.sha256(drawn).hexdigest()
    return orders.hexdigest(), learned, seconds, private_memory() - before


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1_281_167)
    parser.add_argument("--ranks", type=int, default=64)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "listing.pt")
        classes, lines = names(args.pictures)
        made = listing.build(lines, [], classes, {})
        listing.save(made, file)
        print(f"{args.pictures:,} names, {file.stat().st_size / 1e6:.0f} MB for all processes")
        work = [(file, made.digest, rank, world)
                for rank, world in [(0, 1), *((rank, args.ranks) for rank in range(args.ranks))]]
        with multiprocessing.get_context("spawn").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
            (order, expected, *_), *ranks = pool.starmap(simulated_rank, work, 1)
    learned = {}
    for rank, (its_order, its_pictures, *_) in enumerate(ranks):
        if its_order != order:
            sys.exit(f"rank {rank} has other permutations")
        if learned.keys() & its_pictures.keys():
            sys.exit(f"rank {rank} learns what another rank learns")
        learned |= its_pictures
    if learned != expected:
        wrong = [n for n in expected if learned.get(n) != expected[n]]
        sys.exit(f"picture {wrong[0]} is {learned.get(wrong[0])}, by one rank {expected[wrong[0]]}")
    seconds, memory = (max(rank[part] for rank in ranks) for part in (2, 3))
    print(f"{args.ranks} ranks: the same two permutations; together the {BATCH} pictures, t and "
          f"noise of one rank.\nEach maps the names within {seconds:.2f} s and then takes "
          f"{memory:.0f} MB of its own, at most.")


if __name__ == "__main__":
    main()
