"""Random numbers: what belongs to a picture is a function of (seed, number of the picture).

So any number of ranks, parts of a batch and restarts give each picture the same noise. In training
it comes from SplitMix64 (Steele, Lea, Flood, 2014), whose n-th number follows from n alone: a key
for each picture, all its noise at once, the same on any device up to rounding.
"""
from functools import lru_cache

import numpy as np
import torch

from schedule import height_width

TRAINING, SAMPLING, DROPOUT = 1, 2, 3       # streams, the first number of a key
# The constants of SplitMix64, as the int64 of the same bits: torch has little for uint64.
STEP, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9,
                                                     0x94D049BB133111EB))


def seed_of(stream, *key):
    """A well-mixed seed from whole numbers, such as (SAMPLING, seed, number of a picture)."""
    mixed = np.random.SeedSequence((stream, *key)).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def splitmix64(keys, n):
    """Numbers n of the streams that start at `keys`, all int64; the two are broadcast.

    `>>` keeps the sign of an int64, so the bits that it repeats are masked out.
    """
    z = torch.add(keys, n, alpha=STEP)
    z ^= (z >> 30).bitwise_and_((1 << 34) - 1)
    z *= FIRST
    z ^= (z >> 27).bitwise_and_((1 << 37) - 1)
    z *= SECOND
    z ^= (z >> 31).bitwise_and_((1 << 33) - 1)
    return z


def uniform(keys, n):
    """Number n of each stream as a float32 in [0, 1), of 24 bits."""
    return (splitmix64(keys, torch.tensor(n)) >> 40 & (1 << 24) - 1) * 2.0**-24


@lru_cache(1)
def constants(count, device):
    """3, 4, ..., for numbers 1 and 2 of a stream are t and u; and the least value of `a` below."""
    return torch.arange(3, 3 + count, device=device), torch.full((), 2.0**-32, device=device)


def normal(keys, count):
    """(B,) keys -> (B, count) ~ N(0, 1): two of each number, by Box and Muller; 20 launches."""
    half = -(-count // 2)
    n, least = constants(half, keys.device)
    bits = splitmix64(keys[:, None], n).view(torch.int32)
    a = torch.hypot(bits[:, ::2] * 2.0**-31, least)                     # in (0, 1]
    radius = torch.xlogy(-2, a).sqrt_()                                 # sqrt(-2 log a)
    angle = bits[:, 1::2] * (torch.pi * 2.0**-31)                       # in [-pi, pi]
    eps = torch.empty(len(keys), 2, half, device=keys.device)
    torch.cos(angle, out=eps[:, 0])
    torch.sin(angle, out=eps[:, 1])
    eps *= radius[:, None]
    return eps.flatten(1)[:, :count]


def draw_noise(seed, numbers, res, device):
    """What pictures are trained with: t (B,) ~ U(0, 1), eps (B, 3, H, W) ~ N(0, 1), u ~ U(0, 1).

    Each is a function of (seed, number of the picture): the same on any rank and in any part.
    """
    (height, width), kind = height_width(res), torch.device(device).type
    keys = splitmix64(torch.tensor(seed_of(TRAINING, seed)), torch.tensor(list(numbers)))
    t, u = uniform(keys, 1), uniform(keys, 2)
    # To CUDA without waiting; for an Apple GPU it is computed here, whose whole numbers are sure.
    to = dict(device=device, non_blocking=kind == "cuda")
    eps = normal(keys if kind == "mps" else keys.to(**to), 3 * height * width)
    return t.to(**to), eps.to(device).view(-1, 3, height, width), u.to(**to)


def picture_noise(seed, numbers, res, device):
    """A `noise` for `sample`: that of picture i depends on (seed, i), not on its batch."""
    generators = [torch.Generator(device).manual_seed(seed_of(SAMPLING, seed, i)) for i in numbers]
    return lambda: torch.stack([torch.randn(3, *height_width(res), generator=g, device=device)
                                for g in generators])
