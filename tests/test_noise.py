"""The noise of training: SplitMix64 and Box-Muller, evenly spread, unrelated, the same anywhere."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import noise

BITS_64 = 2**64 - 1


def splitmix64(state, count):
    """The generator as published, in Python's whole numbers."""
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & BITS_64
        z = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & BITS_64
        z = (z ^ z >> 27) * 0x94D049BB133111EB & BITS_64
        yield z ^ z >> 31


def signed(number):
    return number - 2**64 if number >> 63 else number


def test_splitmix64_gives_the_published_numbers():
    known = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]      # from state 0
    assert list(splitmix64(0, 3)) == known
    states = [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 0x123456789ABCDEF0]
    ours = noise.splitmix64(torch.tensor([[signed(s)] for s in states]), torch.arange(1, 1001))
    assert ours.tolist() == [[signed(z) for z in splitmix64(s, 1000)] for s in states]


def test_normal_numbers_are_those_of_box_and_muller():
    key = 0x0123456789ABCDEF
    (ours,) = noise.normal(torch.tensor([key]), 4000).double()
    z = np.array(list(splitmix64(key, 2002))[2:], np.uint64)            # 1 and 2 are t and u
    low, high = z.view(np.int32).astype(np.float64).reshape(-1, 2).T / 2**31
    radius = np.sqrt(-2 * np.log(np.abs(low)))
    expected = np.concatenate([radius * np.cos(np.pi * high), radius * np.sin(np.pi * high)])
    assert np.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    odd = noise.normal(torch.tensor([key]), 3999)
    assert torch.equal(odd[0], ours[:3999].float())


def test_zero_bits_give_a_finite_number(monkeypatch):
    monkeypatch.setattr(noise, "splitmix64", lambda keys, n: torch.zeros(1, len(n)).long())
    first, second = noise.normal(torch.tensor([0]), 2)[0].tolist()
    assert math.isclose(first, math.sqrt(64 * math.log(2)), rel_tol=1e-5) and second == 0


def kolmogorov_smirnov(x, cumulative):
    """The largest distance to a distribution, in units in which 1.95 is exceeded once in 1,000."""
    x = np.sort(np.asarray(x, np.float64).ravel())
    expected, n = cumulative(x), len(x)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((expected - steps[:-1]).max(), (steps[1:] - expected).max())


def test_noise_is_normal_and_times_are_uniform():
    t, eps, u = noise.draw_noise(11, range(500, 628), 64, "cpu")
    normal = np.vectorize(lambda x: math.erfc(-x / math.sqrt(2)) / 2)
    assert kolmogorov_smirnov(eps[:16], normal) < 1.95
    flat = eps.double().flatten()                       # 1.6 M; the spread of a moment is known
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(flat.pow(power).mean() - mean) < 4 * math.sqrt(variance / len(flat)), power
    assert 4.5 < flat.abs().max() < 6.7
    t, _, u = noise.draw_noise(11, range(20_000), 2, "cpu")
    for uniform in (t, u):
        assert uniform.dtype == torch.float32 and 0 <= uniform.min() and uniform.max() < 1
        assert kolmogorov_smirnov(uniform, lambda x: x) < 1.95


def test_neighbours_are_unrelated():
    """Pixels, channels, pictures, seeds, t and u; squares of the noise, too."""
    x = torch.stack([noise.draw_noise(seed, range(32), 64, "cpu")[1] for seed in (0, 1)]).double()
    t = torch.stack([noise.draw_noise(0, range(n, n + 20_000), 2, "cpu")[0] for n in (0, 1, 32)])
    u = noise.draw_noise(0, range(20_000), 2, "cpu")[2]

    def related(a, b):
        """Their correlation in units of its spread where there is none."""
        (r,) = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1:]
        return abs(r.item()) * math.sqrt(a.numel())

    for dim in range(5):                                # seed, picture, channel, row, column
        for shift in (1, 2, 3) if x.shape[dim] > 3 else range(1, x.shape[dim]):
            length = x.shape[dim] - shift
            a, b = x.narrow(dim, shift, length), x.narrow(dim, 0, length)
            assert related(a, b) < 4.5 and related(a.square(), b.square()) < 4.5, (dim, shift)
    assert all(related(t[0], other) < 4.5 for other in (t[1], t[2], u))


def test_noise_of_a_batch_takes_few_launches_on_a_gpu():
    """What a GPU would run: operations on its tensors that are not mere views."""
    class Launches(TorchDispatchMode):
        names = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if getattr(result, "device", None) == torch.device("meta") and not func.is_view:
                self.names.append(func.name())
            return result

    noise.draw_noise(0, range(256), 64, "meta")         # once per size: the numbers from 3 on
    with Launches():
        t, eps, u = noise.draw_noise(0, range(256), 64, "meta")
    assert eps.shape == (256, 3, 64, 64) and t.shape == u.shape == (256,)
    copies = [name for name in Launches.names if "copy" in name or "empty" in name]
    assert copies and 10 < len(Launches.names) - len(copies) <= 20, Launches.names


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_draws_the_same_noise():
    for here, there in zip(*(noise.draw_noise(3, range(8), 64, device)
                             for device in ("cpu", "cuda"))):
        assert torch.allclose(here, there.cpu(), rtol=1e-5, atol=2e-5)
