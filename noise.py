"""Random numbers: what belongs to a picture is a function of (seed, number of the picture).

So any number of ranks, parts of a batch and restarts give each picture the same noise, on the same
kind of device. (A generator of the CPU has 2^32 states to start from: of a million pictures about
a hundred pairs share their noise, which does no harm.)
"""
import numpy as np
import torch

from schedule import height_width

TRAINING, SAMPLING, DROPOUT = 1, 2, 3       # streams, the first number of a key


def seed_of(stream, *key):
    """A well-mixed seed from whole numbers, such as (TRAINING, seed, number of a picture)."""
    mixed = np.random.SeedSequence((stream, *key)).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def draw_noise(seed, numbers, res, device):
    """What pictures are trained with: t (B,) ~ U(0, 1), eps (B, 3, H, W) ~ N(0, 1), u ~ U(0, 1).

    Each is a function of (seed, number of the picture): the same on any rank and in any part.
    """
    generator, t, eps, u = torch.Generator(device), [], [], []
    for n in numbers:
        generator.manual_seed(seed_of(TRAINING, seed, n))
        t.append(torch.rand((), generator=generator, device=device))
        u.append(torch.rand((), generator=generator, device=device))
        eps.append(torch.randn(3, *height_width(res), generator=generator, device=device))
    return torch.stack(t), torch.stack(eps), torch.stack(u)


def picture_noise(seed, numbers, res, device):
    """A `noise` for `sample`: that of picture i depends on (seed, i), not on its batch."""
    generators = [torch.Generator(device).manual_seed(seed_of(SAMPLING, seed, i)) for i in numbers]
    return lambda: torch.stack([torch.randn(3, *height_width(res), generator=g, device=device)
                                for g in generators])
