"""Every formula against an independent oracle, every promise of the README against a run.

    pytest test_all.py            the paper and the trainer: about a minute on two CPU cores
    pytest tests                  the machine around them: about ten minutes

A test's name is a sentence of the paper or a promise of ours. benchmarks/mutants.py breaks the
code one line at a time and shows which of these turns red.
"""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

os.environ["DEVICE"] = "cpu"                # also where there is a GPU: to the last bit means on a CPU
import data
import loss as losses
import sample as sampling
import schedule
import text
import train
import unet
import uvit
import wavelet

HERE = Path(__file__).parent
torch.set_num_threads(1)                    # small tensors: a second thread only gets in the way
TIMES = torch.tensor([0, 1e-3, .5, .999, 1], dtype=torch.float64)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """In each test, whichever ran before it."""
    torch.manual_seed(0)


def np_logsnr_cosine(t):
    """The clipped cosine by its definition, alpha = cos, sigma = sin: an oracle in numpy, float64."""
    low, high = np.arctan(np.exp(-7.5)), np.arctan(np.exp(7.5))
    angle = low + np.asarray(t, np.float64) * (high - low)
    return np.log(np.cos(angle) ** 2 / np.sin(angle) ** 2)


# ---------------------------------------------------------------------------- schedule.py

def test_cosine_schedule_is_log_of_cos_over_sin_and_clipped_at_15():
    ours = schedule.logsnr_cosine(TIMES).numpy()
    assert np.allclose(ours, np_logsnr_cosine(TIMES), rtol=0, atol=1e-9)
    assert np.allclose(ours[[0, 2, 4]], [15, 0, -15], atol=1e-9)
    assert abs(ours[3] - -12.31) < .01      # not the -15.25 of a schedule in bfloat16


def test_schedule_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("cosine", "shifted", "interpolated"):
            ours = schedule.logsnr_schedule(name, 128)(TIMES.float())
            exact = schedule.logsnr_schedule(name, 128)(TIMES)
            assert ours.dtype == torch.float32
            assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-3)
            assert all(part.dtype == torch.float32 for part in schedule.alpha_sigma(ours))


def test_schedule_refuses_bfloat16_times():
    with pytest.raises(AssertionError, match="float32"):
        schedule.logsnr_cosine(torch.zeros(1, dtype=torch.bfloat16))


@pytest.mark.parametrize("d, noise_d", [(64, 64), (128, 32), (512, 64), (256, 256), (96, 32)])
def test_shift_is_two_log_ratio(d, noise_d):
    shift = schedule.logsnr_shifted(TIMES, d, noise_d) - schedule.logsnr_cosine(TIMES)
    assert torch.allclose(shift, torch.full_like(shift, 2 * np.log(noise_d / d)), atol=1e-9)
    snr = np.exp(schedule.logsnr_shifted(TIMES, d, noise_d).numpy())                    # Eq. 5 as printed
    assert np.allclose(snr, np.exp(np_logsnr_cosine(TIMES)) * (noise_d / d) ** 2, rtol=1e-9)
    assert torch.equal(schedule.logsnr_shifted(TIMES, 77), schedule.logsnr_shifted(TIMES, 77, 32))   # the default


def test_averaging_multiplies_snr_by_s_squared():
    """Eq. 4 on noise: pooled s x s, z at the shifted logsnr has the SNR of the cosine schedule at noise_d."""
    torch.manual_seed(0)
    d, noise_d, t = 256, 64, torch.tensor([.3], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr_shifted(t, d, noise_d))
    z = alpha * .5 + sigma * torch.randn(64, 1, d, d, dtype=torch.float64)
    pooled = F.avg_pool2d(z, d // noise_d)
    snr = (pooled.mean() / .5) ** 2 / pooled.var()
    assert abs(np.log(snr.item()) - np_logsnr_cosine(.3)) < .02


def test_interpolated_is_shift_32_at_noise_and_shift_256_at_data():
    for d in (256, 512):
        ours = schedule.logsnr_interpolated(TIMES, d).numpy()
        low, high = (np_logsnr_cosine(TIMES) + 2 * np.log(n / d) for n in (32, 256))
        t = TIMES.numpy()
        assert np.allclose(ours, t * low + (1 - t) * high, atol=1e-9)
        assert np.isclose(ours[-1], low[-1]) and np.isclose(ours[0], high[0])
        assert (ours[1:] < ours[:-1]).all()


def test_schedules_by_name_are_the_schedules():
    assert torch.equal(schedule.logsnr_schedule("cosine", 128)(TIMES), schedule.logsnr_cosine(TIMES))
    assert torch.equal(schedule.logsnr_schedule("shifted", 128, 64)(TIMES), schedule.logsnr_shifted(TIMES, 128, 64))
    assert torch.equal(schedule.logsnr_schedule("interpolated", 128, 64)(TIMES), schedule.logsnr_interpolated(TIMES, 128, 64))


def test_variance_is_preserved_and_logsnr_is_log_alpha2_over_sigma2():
    logsnr = torch.linspace(-20, 20, 41, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(logsnr)
    assert alpha.shape == sigma.shape == (41, 1, 1, 1)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)
    assert torch.allclose(torch.log(alpha**2 / sigma**2).flatten(), logsnr, atol=1e-9)


# ---------------------------------------------------------------------------- wavelet.py

def slow_lift(x, floor=False):
    """5/3 lifting of a list, index by index, borders mirrored; with the floors of JPEG 2000's reversible transform."""
    n = len(x)
    mirror = lambda i: x[-i if i < 0 else 2 * (n - 1) - i if i >= n else i]
    if floor:
        d = [mirror(2 * i + 1) - (mirror(2 * i) + mirror(2 * i + 2)) // 2 for i in range(n // 2)]
        s = [mirror(2 * i) + (d[max(i - 1, 0)] + d[i] + 2) // 4 for i in range(n // 2)]
    else:
        d = [mirror(2 * i + 1) - (mirror(2 * i) + mirror(2 * i + 2)) / 2 for i in range(n // 2)]
        s = [mirror(2 * i) + (d[max(i - 1, 0)] + d[i]) / 4 for i in range(n // 2)]
    return s, d


def slow_dwt(x, levels, floor=False):
    """(H, W) array -> list of bands [low, then (d along x, d along y, d along both) coarse to fine], each (h, w)."""
    if levels == 0:
        return [x]
    rows = [slow_lift(list(row), floor) for row in x]
    halves = [np.array([row[k] for row in rows]) for k in (0, 1)]                       # s and d along x
    bands = {}
    for name, half in zip("sd", halves):
        columns = [slow_lift(list(column), floor) for column in half.T]
        for k, along_y in enumerate("sd"):
            bands[name + along_y] = np.array([column[k] for column in columns]).T
    return slow_dwt(bands["ss"], levels - 1, floor) + [bands["ds"], bands["sd"], bands["dd"]]


def unfolded(y, levels):
    """(4^levels, h, w) channels of dwt -> the bands of slow_dwt: undoes space to depth by slicing."""
    bands, at = [y[0]], 1
    for level in range(levels, 0, -1):
        fold = 2 ** (levels - level)
        for _ in range(3):
            band = np.zeros((y.shape[1] * fold, y.shape[2] * fold), y.dtype)
            for row in range(fold):
                for column in range(fold):
                    band[row::fold, column::fold] = y[at]
                    at += 1
            bands.append(band)
    return bands


@pytest.mark.parametrize("levels, size", [(1, (6, 10)), (1, (2, 2)), (2, (8, 12)), (3, (16, 8)), (2, (4, 4))])
def test_wavelet_is_the_5_3_lifting_of_a_slow_loop(levels, size):
    x = np.random.default_rng(0).normal(size=(2, 3, *size))
    y = wavelet.dwt(torch.from_numpy(x), levels).numpy()
    assert y.shape == (2, 3 * 4**levels, size[0] // 2**levels, size[1] // 2**levels)
    single = wavelet.dwt(torch.from_numpy(x[:, :1]), levels).numpy()
    for picture in range(2):
        for ours, slow in zip(unfolded(single[picture], levels), slow_dwt(x[picture, 0], levels), strict=True):
            assert np.allclose(ours, slow, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelet_is_jpeg_2000_reversible_on_integers(levels):
    """Where every division is exact the floors change nothing; elsewhere each lifting step is off by less than one."""
    x = np.random.default_rng(1).integers(0, 256, (16, 16))
    exact = x * 64**levels                                       # each level divides by 2 and 4 along both axes
    ours = unfolded(wavelet.dwt(torch.from_numpy(exact)[None, None].double(), levels)[0].numpy(), levels)
    for a, b in zip(ours, slow_dwt(exact, levels, floor=True), strict=True):
        assert np.array_equal(a, b)
    s, d = wavelet.lift(torch.from_numpy(x).double(), -1)
    for row, s_row, d_row in zip(x, s, d):
        floors = slow_lift([int(v) for v in row], floor=True)
        assert np.abs(s_row.numpy() - floors[0]).max() < 1 and np.abs(d_row.numpy() - floors[1]).max() < 1


def test_wavelet_has_the_taps_of_the_5_3_filter_bank():
    """Also at the borders, where the signal is mirrored about its first and last sample."""
    x = np.random.default_rng(2).normal(size=64)
    s, d = (band.numpy() for band in wavelet.lift(torch.from_numpy(x), -1))
    mirrored = np.pad(x, 2, mode="reflect")
    low = np.convolve(mirrored, np.array([-1, 2, 6, 2, -1]) / 8, "valid")
    high = np.convolve(mirrored[1:-1], np.array([-1, 2, -1]) / 2, "valid")
    assert np.allclose(s, low[::2], atol=1e-12) and np.allclose(d, high[1::2], atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (16, 8), (24, 40), (64, 64)])
def test_wavelet_inverts(levels, size):
    x = torch.randn(2, 3, *size)
    assert (wavelet.idwt(wavelet.dwt(x, levels), levels) - x).abs().max() < 1e-5
    y = torch.randn(2, 4**levels, *(n // 2**levels for n in size))
    assert (wavelet.dwt(wavelet.idwt(y, levels), levels) - y).abs().max() < 1e-4


def test_wavelet_inverts_the_smallest_pictures():
    for levels in (1, 2, 3):
        x = torch.randn(1, 1, 2**levels, 2**levels)
        assert wavelet.dwt(x, levels).shape == (1, 4**levels, 1, 1)
        assert (wavelet.idwt(wavelet.dwt(x, levels), levels) - x).abs().max() < 1e-5
    assert wavelet.dwt(x, 0) is x and wavelet.idwt(x, 0) is x


def test_wavelet_is_linear():
    x, y = torch.randn(2, 1, 3, 16, 24, dtype=torch.float64)
    together = wavelet.dwt(2 * x - 3 * y, 2)
    assert torch.allclose(together, 2 * wavelet.dwt(x, 2) - 3 * wavelet.dwt(y, 2), atol=1e-12)


def test_constant_picture_has_zero_fine_bands_and_keeps_its_scale():
    y = wavelet.dwt(torch.full((1, 1, 16, 16), .7), 3)
    assert torch.allclose(y[:, :1], torch.tensor(.7)) and y[:, 1:].abs().max() < 1e-6


def test_wavelet_512_two_levels_is_128_by_48():
    assert wavelet.dwt(torch.zeros(1, 3, 512, 512), 2).shape == (1, 48, 128, 128)


def test_wavelet_refuses_sizes_that_do_not_divide():
    with pytest.raises(AssertionError, match="divisible by 4"):
        wavelet.dwt(torch.zeros(1, 3, 8, 10), 2)
    with pytest.raises(AssertionError, match="divisible by 4"):
        wavelet.dwt(torch.zeros(1, 3, 10, 8), 2)
    with pytest.raises(AssertionError, match="channels"):
        wavelet.idwt(torch.zeros(1, 15, 8, 8), 2)


def test_wavelet_gradient_is_the_numerical_one():
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: wavelet.dwt(x, 2), x)
    y = torch.randn(1, 16, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: wavelet.idwt(y, 2), y)


# ---------------------------------------------------------------------------- loss.py

class Perfect:
    """A model that knows x: v_hat = (alpha z - x) / sigma, from logsnr by numpy; `off` is added to v_hat."""
    def __init__(self, x, off=0.0):
        self.x, self.off = x, off

    def __call__(self, z, logsnr, label=None):
        alpha, sigma = ((1 / (1 + np.exp(s * logsnr.double().numpy()))) ** .5 for s in (-1, 1))
        alpha, sigma = (torch.from_numpy(a)[:, None, None, None] for a in (alpha, sigma))
        return (alpha * z - self.x) / sigma + self.off


def one_batch(size=8, batch=4, dtype=torch.float64):
    torch.manual_seed(0)
    x, eps, off = torch.rand(batch, 3, size, size, dtype=dtype) * 2 - 1, *torch.randn(2, batch, 3, size, size, dtype=dtype)
    return x, torch.linspace(.1, .9, batch, dtype=dtype), eps, off


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("multiscale", [False, True])
def test_perfect_model_has_zero_loss(kind, multiscale):
    x, t, eps, off = one_batch(64)
    assert losses.diffusion_loss(Perfect(x), x, t, eps, schedule.logsnr_cosine, kind=kind, multiscale=multiscale) < 1e-10
    assert losses.diffusion_loss(Perfect(x, off), x, t, eps, schedule.logsnr_cosine, kind=kind, multiscale=multiscale) > 1e-3


def test_eps_mse_is_alpha_squared_v_mse():
    x, _, eps, off = one_batch()
    for t in (.2, .5, .8):
        t = torch.full((4,), t, dtype=torch.float64)
        alpha2 = np.cos(np.arctan(np.exp(-np_logsnr_cosine(t)[0] / 2))) ** 2
        mse = {kind: losses.diffusion_loss(Perfect(x, off), x, t, eps, schedule.logsnr_cosine, kind=kind).item() for kind in ("eps", "v")}
        assert np.isclose(mse["v"], off.square().mean().item(), rtol=1e-6)
        assert np.isclose(mse["eps"], alpha2 * mse["v"], rtol=1e-6)


def test_v_x_and_eps_are_one_rotation():
    x, t, eps, _ = one_batch()
    angle = torch.linspace(.1, 1.5, 4, dtype=torch.float64)[:, None, None, None]
    alpha, sigma = angle.cos(), angle.sin()
    z, v = alpha * x + sigma * eps, losses.v_from_x_eps(x, eps, alpha, sigma)
    later = (angle + 1e-6).cos() * x + (angle + 1e-6).sin() * eps
    assert torch.allclose(v, (later - z) / 1e-6, atol=1e-5)                             # v is dz / d angle
    assert torch.allclose(losses.x_from_v(z, v, alpha, sigma), x, atol=1e-12)
    assert torch.allclose(losses.eps_from_v(z, v, alpha, sigma), eps, atol=1e-12)


def test_network_sees_z_logsnr_and_label():
    x, t, eps, _ = one_batch()
    seen = []
    losses.diffusion_loss(lambda *args: seen.extend(args) or torch.zeros_like(x), x, t, eps, schedule.logsnr_cosine, label="label")
    z, logsnr, label = seen
    angle = np.arctan(np.exp(-np_logsnr_cosine(t) / 2))[:, None, None, None]
    assert np.allclose(z, np.cos(angle) * x.numpy() + np.sin(angle) * eps.numpy(), atol=1e-9)        # Eq. 1
    assert np.allclose(logsnr, np_logsnr_cosine(t), atol=1e-9) and label == "label"


def test_loss_refuses_an_unknown_kind():
    with pytest.raises(AssertionError, match="kind"):
        losses.diffusion_loss(None, *one_batch()[:3], schedule.logsnr_cosine, kind="x")


@pytest.mark.parametrize("d, b", [(32, 0), (128, 0), (256, -1), (512, -3), (1024, -4), (362.0386719675124, -2)])
@pytest.mark.parametrize("name", ["cosine", "shifted", "interpolated"])
def test_sid2_weight_is_minus_half_the_slope_of_logsnr_times_sigmoid_of_b_minus_logsnr(name, d, b):
    t, h = torch.tensor([.02, .3, .5, .9, .98], dtype=torch.float64), 1e-6
    logsnr = {"cosine": schedule.logsnr_cosine, "shifted": lambda t: schedule.logsnr_shifted(t, d),
              "interpolated": lambda t: schedule.logsnr_interpolated(t, d)}[name]
    slope = (logsnr(t + h) - logsnr(t - h)) / (2 * h)
    by_hand = -slope / 2 / (1 + torch.exp(logsnr(t) - b))
    with torch.no_grad():                   # as in the reports
        weight = losses.sigmoid_weight(t, logsnr, d)
    assert weight.shape == (5, 1, 1, 1) and torch.allclose(weight.flatten(), by_hand, rtol=1e-6)
    lower = losses.sigmoid_weight(t, logsnr, d, b - 3.5).flatten()
    assert torch.allclose(lower, -slope / 2 / (1 + torch.exp(logsnr(t) - b + 3.5)), rtol=1e-6)


@pytest.mark.parametrize("multiscale", [False, True])
@pytest.mark.parametrize("size, given, b", [((64, 64), None, 0), ((128, 512), None, -1), ((64, 64), -4.0, -4), ((128, 512), 0.0, 0)])
def test_sid2_loss_weighs_the_error_of_eps_which_is_its_weight_of_the_error_of_x(multiscale, size, given, b):
    torch.manual_seed(0)
    x, eps, v_hat = (torch.randn(3, 3, *size, dtype=torch.float64) for _ in range(3))
    t, d = torch.tensor([.1, .4, .8], dtype=torch.float64), math.prod(size) ** .5
    logsnr = schedule.logsnr_schedule("shifted", "{}x{}".format(*size))
    ours = losses.diffusion_loss(lambda *args: v_hat, x, t, eps, logsnr, kind="sid2", multiscale=multiscale, b=given)
    by_hand, h = [], 1e-6
    for i in range(3):
        l = logsnr(t[i])
        slope = (logsnr(t[i] + h) - logsnr(t[i] - h)) / (2 * h)
        alpha, sigma = torch.sigmoid(l).sqrt(), torch.sigmoid(-l).sqrt()
        z = alpha * x[i] + sigma * eps[i]
        eps_hat, x_hat = sigma * z + alpha * v_hat[i].float(), alpha * z - sigma * v_hat[i].float()
        scales = [(lambda e, s=s: F.avg_pool2d(e[None], int(d) // s).square().mean() / s) for s in (32, 64, 128, 256) if s <= d] if multiscale \
            else [lambda e: e.square().mean()]
        by_eps = sum(-slope / 2 * torch.sigmoid(b - l) * scale(eps[i] - eps_hat) for scale in scales)
        by_x = sum(-slope / 2 * math.exp(b) * torch.sigmoid(l - b) * scale(x[i] - x_hat) for scale in scales)
        assert torch.allclose(by_eps, by_x, rtol=1e-6)
        by_hand.append(by_eps)
    assert torch.allclose(ours, sum(by_hand) / 3, rtol=1e-5)


def test_pooled_unit_noise_from_256_to_32_has_variance_1_64():
    """multiscale_mse of unit noise: sum over s of (1/s) (s/256)^2, so the 32 x 32 term has variance 1/64."""
    torch.manual_seed(0)
    eps = torch.randn(16, 3, 256, 256)
    assert abs(F.avg_pool2d(eps, 8).var().item() * 64 - 1) < .02
    whole, cut = losses.multiscale_mse(torch.zeros_like(eps), eps), sum((s / 256) ** 2 / s for s in (64, 128, 256))
    assert abs((whole.item() - cut) * 32 * 64 - 1) < .1


def test_multiscale_weights_by_hand():
    """64 x 64: (1/64) mean e^2 + (1/32) mean (2 x 2 means)^2; a constant error counts fully in both, a checkerboard in one."""
    constant, board = torch.full((1, 1, 64, 64), 2.0), torch.ones(1, 1, 64, 64)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    zero = torch.zeros_like(board)
    assert math.isclose(losses.multiscale_mse(constant, zero), 4 / 64 + 4 / 32, rel_tol=1e-6)
    assert math.isclose(losses.multiscale_mse(zero, board), 1 / 64, rel_tol=1e-6)
    assert math.isclose(losses.multiscale_mse(F.interpolate(board, scale_factor=2), torch.zeros(1, 1, 128, 128)), 1 / 128 + 1 / 64, rel_tol=1e-6)
    assert math.isclose(losses.multiscale_mse(torch.ones(2, 3, 32, 32), torch.zeros(2, 3, 32, 32)), 1 / 32, rel_tol=1e-6)
    assert math.isclose(losses.multiscale_mse(torch.ones(1, 1, 32, 128), torch.zeros(1, 1, 32, 128)), 1 / 64 + 1 / 32, rel_tol=1e-6)


# ---------------------------------------------------------------------------- sample.py

class Exact:
    """The exact denoiser of known data, float64: x_hat(z) = E[x | z], returned as v_hat. Counts its calls."""
    classes = 0

    def __init__(self, posterior_mean):
        self.posterior_mean, self.calls = posterior_mean, []

    def __call__(self, z, logsnr, label=None):
        self.calls.append((z, logsnr, label))
        angle = torch.atan(torch.exp(-logsnr / 2))[:, None, None, None]
        return (angle.cos() * z - self.posterior_mean(z, angle.cos(), angle.sin())) / angle.sin()


def gaussian(mean, deviation):
    def posterior_mean(z, alpha, sigma):
        return mean + alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2) * (z - alpha * mean)
    return Exact(posterior_mean)


def two_points(a, b, weight_of_b):
    def posterior_mean(z, alpha, sigma):
        log_odds = math.log(weight_of_b / (1 - weight_of_b)) + ((z - alpha * a) ** 2 - (z - alpha * b) ** 2) / (2 * sigma**2)
        return a + (b - a) * torch.sigmoid(log_odds)
    return Exact(posterior_mean)


def unit_noise(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=generator)


SAMPLERS = [("ancestral", 0.0), ("ancestral", 0.2), ("ancestral", 1.0), ("ddim", 0.0)]


@pytest.mark.parametrize("sampler, gamma", SAMPLERS)
def test_sampler_recovers_gaussian(sampler, gamma):
    x = sampling.sample(gaussian(.2, .15), schedule.logsnr_cosine, unit_noise(40_000), 250, sampler=sampler, gamma=gamma)
    assert abs(x.mean().item() - .2) < .005
    assert abs(x.std().item() / .15 - 1) < .05                  # 250 steps at gamma = 0 narrow it by 4%


@pytest.mark.parametrize("sampler, gamma", SAMPLERS)
def test_sampler_recovers_two_points_and_their_weights(sampler, gamma):
    x = sampling.sample(two_points(-.6, .8, .3), schedule.logsnr_cosine, unit_noise(10_000), 100, sampler=sampler, gamma=gamma)
    assert torch.minimum((x + .6).abs(), (x - .8).abs()).max() < .02
    assert abs((x > 0).double().mean().item() - .3) < .02


@pytest.mark.parametrize("sampler, gamma", SAMPLERS)
def test_sampler_steps_are_gaussian_conditioning(sampler, gamma):
    """A few coarse steps on Gaussian data, where every z stays Gaussian: mean and variance by a scalar recursion.

    The oracle is Bayes' rule for z_s given z_t and x, in the alpha_t|s, sigma_t|s form; DDIM's is that of one eps.
    """
    m, d, steps = .1, .2, 6
    mean, variance = 0.0, 1.0
    for i in range(steps):
        angle_t, angle_s = (np.arctan(np.exp(-np_logsnr_cosine(1 - k / steps) / 2)) for k in (i, i + 1))
        a_t, s_t, a_s, s_s = np.cos(angle_t), np.sin(angle_t), np.cos(angle_s), np.sin(angle_s)
        gain = a_t * d**2 / (a_t**2 * d**2 + s_t**2)                        # x_hat = m + gain (z - a_t m)
        if i == steps - 1:
            of_z, of_x, noise = 0.0, 1.0, 0.0                               # the last step is x_hat
        elif sampler == "ddim":
            of_z, of_x, noise = s_s / s_t, a_s - s_s * a_t / s_t, 0.0
        else:
            a_ts, s_ts2 = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
            of_z, of_x = a_ts * s_s**2 / s_t**2, a_s * s_ts2 / s_t**2
            noise = s_ts2**gamma * (s_ts2 * s_s**2 / s_t**2) ** (1 - gamma)
        mean = (of_z + of_x * gain) * mean + of_x * (1 - gain * a_t) * m
        variance = (of_z + of_x * gain) ** 2 * variance + noise
    x = sampling.sample(gaussian(m, d), schedule.logsnr_cosine, unit_noise(400_000), steps, sampler=sampler, gamma=gamma)
    assert abs(x.mean().item() - mean) < .002
    assert abs(x.var().item() / variance - 1) < .01


@pytest.mark.parametrize("sampler, gamma", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampler_makes_exactly_steps_calls_on_a_uniform_grid(sampler, gamma, steps):
    model = gaussian(0, .2)
    sampling.sample(model, schedule.logsnr_cosine, unit_noise(3), steps, sampler=sampler, gamma=gamma)
    times = [1 - i / steps for i in range(steps)]
    assert np.allclose([logsnr[0].item() for _, logsnr, _ in model.calls], np_logsnr_cosine(times), atol=1e-3)


@pytest.mark.parametrize("sampler, gamma", SAMPLERS)
def test_last_step_is_x_hat_clipped(sampler, gamma):
    for mean in (.3, 5.0):
        model = gaussian(mean, .2)
        x = sampling.sample(model, schedule.logsnr_cosine, unit_noise(50), 5, sampler=sampler, gamma=gamma)
        z, logsnr, _ = model.calls[-1]
        angle = torch.atan(torch.exp(-logsnr / 2))[:, None, None, None]
        assert torch.allclose(x, model.posterior_mean(z, angle.cos(), angle.sin()).clamp(-1, 1), atol=1e-6)
    assert torch.equal(x, torch.ones_like(x))


class Labelled:
    """v_hat = label as a number, 10 classes, null class worth 10: guidance by hand."""
    classes = 10

    def __call__(self, z, logsnr, label):
        self.batch = len(z)
        return label.to(z.dtype)[:, None, None, None].expand_as(z)


def test_guidance_1_is_the_conditional_model_and_else_one_call_of_both():
    model, z, label = Labelled(), torch.zeros(2, 1, 1, 1), torch.tensor([3, 4])
    by_hand = lambda scale: [(1 + (scale - 1)) * c - (scale - 1) * 10 for c in (3, 4)]      # (1 + eta) cond - eta uncond
    for scale in (1, 0, 2.5):
        assert torch.allclose(sampling.guided(model, z, torch.zeros(2), label, scale).flatten(), torch.tensor(by_hand(scale)) + .0)
        assert model.batch == (2 if scale == 1 else 4)


def test_guidance_on_v_is_guidance_on_eps():
    """The paper combines eps_hat, ours v_hat: eps = sin z + cos v of both must agree, at any angle."""
    model, z, label, eta = Labelled(), torch.randn(2, 1, 1, 1), torch.tensor([3, 4]), 1.5
    for angle in (.2, .9, 1.4):
        eps = lambda v: math.sin(angle) * z + math.cos(angle) * v
        v_hat = sampling.guided(model, z, torch.zeros(2), label, 1 + eta)
        by_hand = (1 + eta) * eps(label[:, None, None, None]) - eta * eps(torch.full((2, 1, 1, 1), 10.0))
        assert torch.allclose(eps(v_hat), by_hand, atol=1e-5)


def test_guidance_on_an_interval_of_logsnr_and_nowhere_else():
    seen = []

    def model(z, logsnr, label):
        seen.append((len(z), logsnr[0].item(), logsnr.std().item()))
        return torch.zeros_like(z)
    model.classes = 10
    noise = lambda: torch.ones(2, 1, 1, 1)
    sampling.sample(model, schedule.logsnr_cosine, noise, 20, torch.tensor([1, 2]), guidance=3.0, interval=(-2, 1.5))
    assert len(seen) == 20 and {batch for batch, *_ in seen} == {2, 4} and all(spread == 0 for *_, spread in seen)
    assert all(batch == (4 if -2 <= logsnr <= 1.5 else 2) for batch, logsnr, _ in seen)
    clock = np_logsnr_cosine(np.linspace(1, 0, 21)[:20])
    assert np.allclose([logsnr for _, logsnr, _ in seen], clock, atol=1e-4)


def test_unconditional_is_the_null_class_and_the_empty_caption_the_same_way_up():
    assert text.unconditional(torch.tensor([3, 4]), 10).tolist() == [10, 10]
    rows = torch.tensor([[3, 1, 7, 8, 0], [4, 0, 9, 0, 0]])
    assert text.unconditional(rows, 10).tolist() == [[10, 1, 0, 0, 0], [10, 0, 0, 0, 0]]
    assert text.condition(3, True, [7, 8]).tolist() == [3, 1, 7, 8]


def test_noise_of_a_picture_does_not_depend_on_its_batch():
    together, alone = sampling.picture_noise(3, range(4), 8, "cpu"), sampling.picture_noise(3, [2], 8, "cpu")
    for _ in range(2):
        assert torch.equal(together()[2], alone()[0])
    assert not torch.equal(together()[0], together()[0])
    noise = sampling.picture_noise(3, range(64), 32, "cpu")()
    assert abs(noise.mean()) < .01 and abs(noise.std() - 1) < .01


# ---------------------------------------------------------------------------- uvit.py

def small_uvit(res=32, **options):
    torch.manual_seed(0)
    shape = dict(widths=(16, 16, 32, 64), blocks=(1, 1, 2), depth=2, head=32, emb=32, classes=10)
    return uvit.UViT(res, **(shape | options))


def trained(model, steps=4, res=32):
    """A few steps of Adam. (After one, only the output layer has left zero: by design nothing else can matter yet.)"""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, label = torch.rand(4, 3, res, res) * 2 - 1, torch.arange(4)
    for _ in range(steps):
        loss = losses.diffusion_loss(model, x, torch.rand(4), torch.randn_like(x), schedule.logsnr_cosine, label if model.classes else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("name", ["tiny", "small"])       # the others are the same code, too large for a laptop
def test_output_is_zero_at_the_start(name):
    model = uvit.UViT(64, **uvit.PRESETS[name], classes=3)
    v_hat = model(torch.randn(1, 3, 64, 64), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert v_hat.shape == (1, 3, 64, 64) and v_hat.abs().max() == 0


@pytest.mark.parametrize("patch", ["dwt", "conv", "none"])
def test_every_patch_keeps_the_shape_and_gives_every_weight_a_gradient(patch):
    model = trained(small_uvit(256, patch=patch, widths=(8, 8, 8, 16), head=8), steps=3, res=256)
    z = torch.randn(1, 3, 256, 256)
    v_hat = model(z, torch.zeros(1), torch.tensor([3]))
    assert v_hat.shape == z.shape
    v_hat.square().sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_inverse_wavelet_is_in_float32_under_autocast():
    """In bfloat16, of 8 bits, the picture put together from its bands would be rounded once more."""
    model = small_uvit(160)
    with torch.no_grad():
        for p in model.project_out.parameters():
            p.normal_()
        with torch.autocast("cpu", torch.bfloat16):
            v_hat = model(torch.randn(1, 3, 160, 160), torch.zeros(1))
    assert model.levels == 1 and v_hat.dtype == torch.float32 and not torch.equal(v_hat, v_hat.bfloat16().float())


def test_upsampling_makes_each_value_a_square():
    h = torch.randn(2, 3, 4, 5)
    assert torch.equal(uvit.Upsample()(h), F.interpolate(h, scale_factor=2, mode="nearest"))


def test_logsnr_label_and_position_change_the_output():
    model = trained(small_uvit())
    z, logsnr, label = torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([1, 2])
    out = model(z, logsnr, label)
    assert (model(z, logsnr + 1, label) - out).abs().max() > 1e-4
    assert (model(z, logsnr, label + 1) - out).abs().max() > 1e-4
    assert (model(z, logsnr) - out).abs().max() > 1e-4
    assert torch.equal(model(z, logsnr), model(z, logsnr, torch.full((2,), model.classes)))      # None is the null class
    model.position.data = model.position.data.flip(-1)
    assert (model(z, logsnr, label) - out).abs().max() > 1e-4


def test_each_skip_changes_the_output():
    model = trained(small_uvit(64), res=64)
    z, logsnr = torch.randn(2, 3, 64, 64), torch.zeros(2)
    out, blocks = model(z, logsnr), [block for level in model.up for block in level]
    assert len(blocks) == sum(len(level) for level in model.down) == 3
    for block in blocks:
        hook = block.norm_skip.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
        assert (model(z, logsnr) - out).abs().max() > 1e-5
        hook.remove()
    assert torch.equal(model(z, logsnr), out)


def test_skips_are_popped_in_reverse_order():
    model, given, taken = small_uvit(64), [], []
    for level in model.down:
        for block in level:
            block.register_forward_hook(lambda module, args, out: given.append(out.data_ptr()))
    for level in model.up:
        for block in level:
            block.norm_skip.register_forward_pre_hook(lambda module, args: taken.append(args[0].data_ptr()))
    with torch.no_grad():
        model(torch.randn(1, 3, 64, 64), torch.zeros(1))
    assert len(given) == 3 and taken == given[::-1]


@pytest.mark.parametrize("dropout_res, dropped", [(16, {16}), (32, {32, 16}), (64, {64, 32, 16}), (0, {16})])
def test_dropout_acts_only_at_its_levels(dropout_res, dropped):
    model, seen = trained(small_uvit(64, dropout=.5, dropout_res=dropout_res), res=64).train(), {}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            def hook(module, args, out):
                side = out.shape[-1] if out.dim() == 4 else math.isqrt(out.shape[1])
                seen.setdefault(side, set()).add(not torch.equal(args[0], out))
            module.register_forward_hook(hook)
    model(torch.randn(2, 3, 64, 64), torch.zeros(2))
    assert seen == {side: {side in dropped} for side in (64, 32, 16)}
    seen.clear()
    model.eval()(torch.randn(2, 3, 64, 64), torch.zeros(2))
    assert seen == {64: {False}, 32: {False}, 16: {False}}


def test_attention_sees_the_whole_map_and_mlp_does_not_mix_pixels():
    torch.manual_seed(0)
    mlp, attention = uvit.MLPBlock(32, 16, 0.0), uvit.AttentionBlock(32, 16)
    for layer in (mlp.linear_out, attention.linear_out):
        torch.nn.init.normal_(layer.weight)
    x = torch.randn(1, 9, 32)
    moved = x.clone()
    moved[0, 4] += torch.randn(32)
    changed = lambda a, b: (a - b).abs().amax(-1).flatten() > 1e-6
    assert changed(mlp(x, torch.ones(1, 16)), mlp(moved, torch.ones(1, 16))).tolist() == [i == 4 for i in range(9)]
    assert changed(attention(x), attention(moved)).all()


def random_weights(module):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=.5)
    return module.double()


def group_norm_by_hand(x, norm):
    grouped = x.reshape(len(x), norm.num_groups, -1)
    mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, keepdim=True, unbiased=False)
    plain = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return plain * norm.weight[:, None, None] + norm.bias[:, None, None]


@torch.no_grad()
def test_resblock_is_film_and_an_added_normalised_skip():
    torch.manual_seed(0)
    block = random_weights(uvit.ResBlock(16, 8, 0.0, skip=True))
    x, skip, emb = torch.randn(2, 16, 6, 6).double(), torch.randn(2, 16, 6, 6).double(), torch.randn(2, 8).double()
    swish = lambda h: h / (1 + torch.exp(-h))
    h = (group_norm_by_hand(x, block.norm_in) + group_norm_by_hand(skip, block.norm_skip)) / 2**.5
    h = F.conv2d(swish(h), block.conv_in.weight, block.conv_in.bias, padding=1)
    film = emb @ block.film.weight.T + block.film.bias
    scale, shift = film[:, :16, None, None], film[:, 16:, None, None]
    h = swish(group_norm_by_hand(h, block.norm_film) * (1 + scale) + shift)
    by_hand = x + F.conv2d(h, block.conv_out.weight, block.conv_out.bias, padding=1)
    assert torch.allclose(block(x, emb, skip), by_hand)


@torch.no_grad()
def test_mlp_block_is_film_on_4_c_hidden_units_after_swish():
    torch.manual_seed(0)
    block = random_weights(uvit.MLPBlock(8, 6, 0.0))
    x, emb = torch.randn(2, 5, 8).double(), torch.randn(2, 6).double()
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    h = h @ block.linear_in.weight.T + block.linear_in.bias
    film = (emb @ block.film.weight.T + block.film.bias)[:, None]
    h = h * torch.sigmoid(h) * (1 + film[..., :32]) + film[..., 32:]
    assert torch.allclose(block(x, emb), x + h @ block.linear_out.weight.T + block.linear_out.bias)


@torch.no_grad()
def test_attention_normalises_q_and_k_per_head():
    torch.manual_seed(0)
    block = random_weights(uvit.AttentionBlock(8, 4)).float()           # q and k are normalised in float32
    x = torch.randn(1, 5, 8)
    h = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt() * block.norm.weight + block.norm.bias
    qkv, out = (h @ block.qkv.weight.T + block.qkv.bias)[0], torch.zeros(5, 8)
    rms = lambda a, weight: a / a.square().mean(-1, keepdim=True).sqrt() * weight
    for head in (0, 1):
        q, k, v = (qkv[:, 8 * part + 4 * head:8 * part + 4 * head + 4] for part in range(3))
        scores = rms(q, block.norm_q.weight) @ rms(k, block.norm_k.weight).T / 4**.5
        out[:, 4 * head:4 * head + 4] = torch.softmax(scores, -1) @ v
    by_hand = x + out @ block.linear_out.weight.T + block.linear_out.bias
    assert torch.allclose(block(x), by_hand, atol=1e-4)


@torch.no_grad()
def test_clock_is_sinusoids_of_logsnr_and_the_class_is_added():
    embedding = uvit.Embedding(8, 3)
    logsnr, label = torch.tensor([-3.0, 10.0]), torch.tensor([2, 0])
    angle = logsnr[:, None] * 2 * math.pi / torch.tensor([1, 100 ** (1 / 3), 100 ** (2 / 3), 100])
    swish = torch.nn.functional.silu
    h = swish(torch.cat([angle.sin(), angle.cos()], 1) @ embedding.linear_in.weight.T + embedding.linear_in.bias)
    h = h @ embedding.linear_out.weight.T + embedding.linear_out.bias + embedding.label.weight[label]
    assert torch.allclose(embedding(logsnr, label[:, None]), swish(h), atol=1e-5)


def test_bottom_is_mlp_then_attention_with_positions_of_deviation_0_01():
    model, calls = small_uvit(64), []
    for module in model.modules():
        if isinstance(module, (uvit.MLPBlock, uvit.AttentionBlock)):
            module.register_forward_hook(lambda module, args, out: calls.append((type(module).__name__, tuple(out.shape))))
    model(torch.randn(1, 3, 64, 64), torch.zeros(1))
    assert calls == [("MLPBlock", (1, 256, 64)), ("AttentionBlock", (1, 256, 64))] * 2
    assert model.position.shape == (1, 64, 16, 16) and abs(model.position.std() / .01 - 1) < .05


@pytest.mark.parametrize("res, H, W", [(64, 16, 16), ("32x48", 8, 12)])
def test_positions_may_start_as_waves_of_periods_from_2_tokens_to_twice_the_side(res, H, W):
    position = small_uvit(res, start="waves").position[0].detach().numpy()
    periods = np.geomspace(2, 2 * max(H, W), 16)
    for i in range(16):
        for y, x in [(0, 0), (1, 3), (H - 1, W - 2)]:
            expected = [f(2 * math.pi * at / periods[i]) / 2 for at in (y, x) for f in (math.sin, math.cos)]
            np.testing.assert_allclose(position[i::16, y, x], expected, atol=1e-4)
    assert [name for name, row in uvit.PRESETS.items() if row["start"] == "waves"] == ["tiny", "mini"]


def test_down_is_average_pool_and_up_is_nearest():
    model = small_uvit()
    pool, unpool = model.pool[0], model.unpool[0]
    x = torch.randn(1, 32, 8, 8)
    by_hand = x.reshape(1, 32, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(pool(x), torch.einsum("oc,bchw->bohw", pool[1].weight[..., 0, 0], by_hand) + pool[1].bias[:, None, None], atol=1e-5)
    up = unpool(torch.randn(1, 64, 2, 2))
    assert torch.equal(up[..., ::2, ::2], up[..., 1::2, 1::2]) and up.shape == (1, 32, 4, 4)


PARAMETERS = {"tiny": 2.6, "mini": 7.5, "small": 48.6, "base": 360.6, "paper": 2455.8}       # millions: the README's table


@pytest.mark.parametrize("name", uvit.PRESETS)
def test_preset_builds_with_the_parameter_count_of_the_table(name):
    with torch.device("meta"):
        model = uvit.UViT(512, **uvit.PRESETS[name], classes=1000)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert abs(count - PARAMETERS[name]) < .06
    assert name != "paper" or 2400 < count < 2500


@pytest.mark.parametrize("res, levels, top", [(16, 0, 16), (32, 0, 32), (64, 0, 64), (128, 0, 128), (256, 1, 128),
                                              (384, 2, 96), (512, 2, 128), (1024, 3, 128)])
def test_top_level_is_never_above_128(res, levels, top):
    with torch.device("meta"):
        model = small_uvit(res)
        shapes = []
        model.project_in.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
        assert model(torch.zeros(1, 3, res, res), torch.zeros(1)).shape == (1, 3, res, res)
    assert model.levels == levels and shapes[0][-2:] == (top, top)
    assert model.position.shape[-1] in range(9, 17)


@pytest.mark.parametrize("net, res, width", [("uvit", "64", 16), ("uvit", "256", 16), ("uvit", "384x640", 48), ("uvit", "1024", 128),
                                             ("unet", "256", 16), ("unet", "384x640", 48)])
def test_top_level_is_as_wide_as_there_are_bands(net, res, width):
    config = vars(train.parse_config(["--res", res, "--model", "tiny", "--net", net]))
    with torch.device("meta"):
        model = sampling.network(config, 0)
    assert model.project_in.out_channels == model.norm_out.num_channels == width


# ---------------------------------------------------------------------------- text.py, unet.py, any shape


@torch.no_grad()
def test_residual_skip_is_up_of_h_less_h_after_plus_h_before():
    """SiD2's, on a U-ViT of one level with no block: x = up(x - h_after) + h_before."""
    torch.manual_seed(0)
    model = uvit.UViT(32, (8, 16), (0,), 0, 8, 8, residual=True)
    random_weights(model).float()
    z = torch.randn(1, 3, 32, 32)
    before = model.project_in(z)
    after = model.pool[0](before)
    h = model.unpool[0](after + model.position - after) + before
    by_hand = model.project_out(F.silu(model.norm_out(h)))
    assert torch.allclose(model(z, torch.zeros(1)), by_hand, atol=1e-5)
    assert not torch.allclose(uvit.UViT(32, (8, 16), (0,), 0, 8, 8)(z, torch.zeros(1)), by_hand, atol=1e-3)


def test_one_skip_a_level_gives_every_weight_a_gradient():
    model = trained(small_uvit(64, residual=True), res=64)
    assert not any("norm_skip" in name for name in model.state_dict())
    losses.diffusion_loss(model, torch.rand(2, 3, 64, 64), torch.rand(2), torch.randn(2, 3, 64, 64), schedule.logsnr_cosine, torch.tensor([1, 2])).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_d_of_a_picture_that_is_not_square_is_the_root_of_its_pixels():
    assert schedule.sides("384x640") == (384, 640) and schedule.sides(64) == schedule.sides("64") == schedule.sides("64x64") == (64, 64)
    assert schedule.side("384x640") == pytest.approx((384 * 640) ** .5) and schedule.side(512) == 512
    ours = schedule.logsnr_schedule("shifted", "384x640")(TIMES) - schedule.logsnr_cosine(TIMES)
    assert torch.allclose(ours, torch.full_like(ours, math.log(32 * 32 / (384 * 640))))


def test_384_x_640_is_a_96_x_160_map_and_a_12_x_20_transformer():
    with torch.device("meta"):
        model = uvit.UViT("384x640", **uvit.PRESETS["small"])
        seen = {}
        model.project_in.register_forward_hook(lambda layer, given, made: seen.update(top=made.shape))
        assert model(torch.zeros(1, 3, 384, 640), torch.zeros(1)).shape == (1, 3, 384, 640)
    assert model.levels == 2 and model.position.shape[2:] == (12, 20) and seen["top"] == (1, 64, 96, 160)


def test_wavelet_and_network_keep_what_is_where_in_a_picture_that_is_not_square():
    x = torch.randn(1, 3, 32, 80)
    assert torch.allclose(wavelet.idwt(wavelet.dwt(x, 2), 2), x, atol=1e-5)
    assert torch.allclose(wavelet.dwt(x.mT, 1)[:, :3], wavelet.dwt(x, 1)[:, :3].mT, atol=1e-6)
    torch.manual_seed(0)
    model = random_weights(small_uvit("16x48")).float().eval()
    z = torch.randn(1, 3, 16, 48, requires_grad=True)
    model(z, torch.zeros(1), torch.tensor([1]))[0, 0, 3, 44].backward()
    y, x = divmod(z.grad[0].abs().sum(0).flatten().argmax().item(), 48)
    assert abs(y - 3) <= 2 and abs(x - 44) <= 2


def small_unet(res=32, **options):
    torch.manual_seed(0)
    return unet.UNet(res, 4, 16, 32, **(dict(classes=10, blocks_16=1, dropout=0.0) | options))


def test_a_label_of_another_length_is_refused():
    model, z = small_uvit(text=text.ByteEncoder(6, 64)), torch.zeros(1, 3, 32, 32)
    for row in ([0], [0, 0], [0, 0, 5, 6, 0, 0, 0, 0]):
        model(z, torch.zeros(1), torch.tensor([row]))
    for network, length in ((model, 10), (model, 3), (small_unet(), 8)):
        with pytest.raises(AssertionError, match=f"not {length}"):
            network(z, torch.zeros(1), torch.zeros(1, length, dtype=torch.long))
    with pytest.raises(AssertionError, match="'wave'"):
        small_uvit(start="wave")


# ---------------------------------------------------------------------------- data.py


def write_folder(folder, count=8, size=(40, 32), classes=("a", "b")):
    for i in range(count):
        file = folder / classes[i % len(classes)] / f"{i}.png" if classes else folder / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(file)


# ---------------------------------------------------------------------------- train.py

SMALL = "--res 32 --batch 8 --accum 1 --bf16 off --compile off --sample-every 0 --save-every 1000 --log-every 1".split()
PYTHON, TORCHRUN = [sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def run_train(out, *flags):
    """The trainer in this process -> its last checkpoint."""
    train.main([*SMALL, "--out", str(out), *flags])
    return last_checkpoint(out)


def run_script(*command, code=0):
    """A command as a user types it, in the repository's folder -> its output."""
    done = subprocess.run([str(word) for word in command], cwd=HERE, capture_output=True, text=True, timeout=900,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def last_checkpoint(out):
    return torch.load(sorted(Path(out).glob("ckpt-*.pt"))[-1], weights_only=True)


def log_lines(out, key="loss"):
    return [line for line in map(json.loads, Path(out, "log.jsonl").read_text().splitlines()) if key in line]


def assert_same_bits(a, b):
    """Nested dicts and lists of tensors, equal to the last bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same_bits(x, y)
    else:
        assert a == b


def apart(a, b):
    """How far two runs from one start are apart: averaged gradient (relative), weights (in parts of the way they went)."""
    torch.manual_seed(a["config"]["seed"])
    start = sampling.network(a["config"], len(a["classes"])).state_dict()
    norm = lambda tensors: math.sqrt(sum(tensor.square().sum().item() for tensor in tensors))
    moments = [[state["exp_avg"] for state in run["optimizer"]["state"].values()] for run in (a, b)]
    return (norm(p - q for p, q in zip(*moments)) / norm(moments[0]),
            norm(a["model"][n] - b["model"][n] for n in start) / norm(a["model"][n] - start[n] for n in start))


def same_to_rounding(a, b):
    """After a few steps: the same averaged gradient to 1e-4, and weights apart by under 1% of the way they went.

    1% because Adam with eps = 1e-12 turns the rounding of a nearly zero gradient into a whole step.
    """
    gradient, weights = apart(a, b)
    return gradient < 1e-4 and weights < 1e-2


LITTLE = dict(widths=(16, 16, 16, 32), blocks=(1, 1, 1), depth=2, head=32, emb=32, dropout=0.0)


@pytest.fixture
def little(monkeypatch):
    """A network that trains in seconds in place of `tiny`, for what runs in this process."""
    monkeypatch.setitem(uvit.PRESETS, "tiny", LITTLE)


def test_trainer_overfits_one_batch(tmp_path, little):
    """Eight pictures of one colour each, again and again: the trained model removes nearly all noise from them."""
    for i in range(8):
        Image.new("RGB", (16, 16), tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())).save(tmp_path / f"{i}.png")
    run_train(tmp_path / "run", "--data", str(tmp_path), "--res", "16", "--steps", "400", "--log-every", "10")
    loss = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert loss[0] > .2 and np.mean(loss[-10:]) < .1 * loss[0]


def test_no_picture_is_seen_twice_or_skipped_within_an_epoch_across_a_resume(tmp_path, little, monkeypatch):
    write_folder(tmp_path / "set", 24, (32, 32))
    honest, seen, given = data.Pictures.picture, [], []
    monkeypatch.setattr(data.Pictures, "picture", lambda self, i: seen.append(i) or honest(self, i))
    for start, stop in ((0, 2), (2, 5), (5, 6)):        # 24 files, 8 a step: two epochs
        seen.clear()
        run_train(tmp_path / "run", "--data", str(tmp_path / "set"), "--steps", str(stop))
        assert len(seen) == 16 + 8 * (stop - start)     # 16 for the reports
        given += seen[16:]
    assert sorted(given[:24]) == sorted(given[24:]) == list(range(24)) and given[:24] != given[24:]


def test_accumulation_4_x_2_equals_batch_8(tmp_path, little):
    whole, parts = run_train(tmp_path / "whole", "--steps", "4"), run_train(tmp_path / "parts", "--steps", "4", "--accum", "4")
    assert same_to_rounding(whole, parts)
    other = run_train(tmp_path / "other", "--steps", "4", "--seed", "1")
    assert not same_to_rounding(whole, other)


def test_ema_equals_the_model_after_step_1_and_then_warms_up(tmp_path, little):
    saved = run_train(tmp_path, "--steps", "1")
    assert_same_bits(saved["ema"], saved["model"])
    decays = [train.ema_decay(n, .9999) for n in range(200_000)]
    assert decays[0] == 0 and decays[1] == (1 + 0) / (10 + 0) and decays[100] == (1 + 99) / (10 + 99)
    assert max(decays) == decays[-1] == .9999
    for decay, flags in ((.1, []), (.05, ["--ema", ".05"])):
        first = run_train(tmp_path / f"{decay}", "--steps", "1", "--lr", ".1", *flags)
        second = run_train(tmp_path / f"{decay}", "--steps", "2", "--lr", ".1", *flags)
        by_hand = {name: decay * first["ema"][name] + (1 - decay) * second["model"][name] for name in first["ema"]}
        assert all(torch.allclose(by_hand[name], second["ema"][name], rtol=0, atol=1e-6) for name in by_hand)


def test_first_step_is_adam_with_warm_up_and_clipping(tmp_path, little):
    """Adam's first step is lr times the sign of the gradient, and its average 1 - beta_1 = 0.1 of the clipped gradient."""
    saved = run_train(tmp_path, "--steps", "1", "--lr", "0.01", "--warmup", "5", "--clip", "0.25")
    torch.manual_seed(0)
    start = sampling.network(saved["config"], 10).state_dict()
    moved = torch.cat([(saved["model"][name] - start[name]).flatten().abs() for name in start])
    moved = moved[moved > 0]
    assert moved.max() < .01 / 5 * 1.001 and moved.median() > .01 / 5 * .999 and len(moved) > 100
    state = saved["optimizer"]["state"].values()
    assert log_lines(tmp_path)[0]["norm"] > .25 and log_lines(tmp_path)[0]["lr"] == .01 / 5
    assert math.isclose(math.sqrt(sum(s["exp_avg"].square().sum().item() for s in state)), .1 * .25, rel_tol=1e-3)
    second_moment = sum(s["exp_avg_sq"].sum().item() for s in state)
    assert math.isclose(second_moment, (1 - .99) * .25**2, rel_tol=1e-3)


def test_adams_eps_is_1e_12(tmp_path, little):
    """A step is lr g / (|g| + eps): with gradients of at most 1e-9, an eps of 1e-8 would hardly move the weights."""
    saved = run_train(tmp_path, "--steps", "1", "--lr", "0.01", "--warmup", "1", "--clip", "1e-9")
    torch.manual_seed(0)
    start = sampling.network(saved["config"], 10).state_dict()
    moved = torch.cat([(start[name] - saved["model"][name]).flatten() for name in start])
    g = torch.cat([s["exp_avg"].flatten() for s in saved["optimizer"]["state"].values()]) / .1
    large = g.abs() > 1e-12
    assert large.sum() > 100
    torch.testing.assert_close(moved[large], (.01 * g / (g.abs() + 1e-12))[large], rtol=.01, atol=1e-6)


def test_run_folder_holds_two_checkpoints_model_log_and_grids(tmp_path, little):
    run_train(tmp_path, "--steps", "3", "--save-every", "1", "--sample-every", "2")
    assert sorted(file.name for file in tmp_path.iterdir()) == \
        ["ckpt-00000002.pt", "ckpt-00000003.pt", "grid-0000002.png", "grid-0000003.png", "grid.png", "log.jsonl", "model.pt"]
    assert Image.open(tmp_path / "grid.png").size == (10 * 32, 4 * 32)
    (levels,) = [line["loss_by_noise_level"] for line in log_lines(tmp_path, "loss_by_noise_level") if line["step"] == 2]
    assert len(levels) == 8 and levels[0] > levels[-1] > 0           # eps is hard to see where there is little of it


def test_schedule_and_loss_of_the_command_line_reach_the_training(tmp_path, little):
    run_train(tmp_path / "0", "--res", "64", "--steps", "1")
    first_loss = lambda name: log_lines(tmp_path / name)[0]["loss"]
    for flags in ("--schedule cosine", "--schedule interpolated", "--noise-d 64", "--loss v", "--multiscale on"):
        run_train(tmp_path / flags, "--res", "64", "--steps", "1", *flags.split())
        assert abs(first_loss(flags) / first_loss("0") - 1) > .01, flags
    # At the start v_hat = 0, so the losses follow by hand from the same draws.
    t, eps, _ = train.draw_noise(0, 0, 8, 64, "cpu")
    x = torch.stack([data.Flowers(64)[n][0] for n in range(8)])
    angle = np.arctan(np.exp(-(np_logsnr_cosine(t) + 2 * np.log(32 / 64)) / 2))[:, None, None, None]
    alpha, sigma = (torch.from_numpy(part).float() for part in (np.cos(angle), np.sin(angle)))
    assert math.isclose(first_loss("0"), (eps - sigma * (alpha * x + sigma * eps)).square().mean(), rel_tol=1e-4)
    assert math.isclose(first_loss("--loss v"), (alpha * eps - sigma * x).square().mean(), rel_tol=1e-4)


def test_noise_of_a_picture_is_a_function_of_seed_and_number():
    t, eps, u = train.draw_noise(5, 10, 4, 8, "cpu")
    t2, eps2, u2 = train.draw_noise(5, 12, 1, 8, "cpu")
    assert t[2] == t2[0] and u[2] == u2[0] and torch.equal(eps[2], eps2[0])
    t, eps, u = train.draw_noise(0, 0, 4000, 4, "cpu")
    for uniform in (t, u):
        assert abs(uniform.mean() - .5) < .02 and abs(uniform.var() - 1 / 12) < .005
    assert abs(torch.corrcoef(torch.stack([t, u]))[0, 1]) < .05 and abs(eps.std() - 1) < .01


def test_labels_are_dropped_for_their_share(tmp_path, little, monkeypatch):
    honest, seen = train.diffusion_loss, []
    monkeypatch.setattr(train, "diffusion_loss", lambda net, x, t, eps, logsnr, label, *rest: seen.append(label)
                        or honest(net, x, t, eps, logsnr, label, *rest))
    for share in (.1, .5):
        seen.clear()
        run_train(tmp_path / str(share), "--steps", "50", "--drop-label", str(share))
        assert abs((torch.cat(seen)[:, 0] == 10).float().mean() - share) < .06


@pytest.mark.parametrize("flags, chosen", [       # on a machine with CUDA
    ("", dict(model="tiny", batch=32, multiscale="off")), ("--res 65x64", None), ("--res 128", dict(model="base", batch=256, steps=300_000, multiscale="off")),
    ("--res 256", dict(model="base", multiscale="off")), ("--res 512", dict(multiscale="on")), ("--res 384x640", dict(multiscale="off")),
    ("--res 512x1024", dict(multiscale="on")), ("--res 512 --loss sid2", dict(multiscale="off")), ("--res 64 --multiscale on", dict(multiscale="on")),
    ("--res 128 --model paper", dict(batch=2048, steps=500_000, lr=1e-4)), ("--res 256 --model paper --net unet", dict(batch=512, steps=2_000_000, lr=5e-5)),
    ("--res 128 --model base --net unet", dict(batch=256, lr=2e-4)), ("--model paper --batch 7 --lr 1e-3", dict(batch=7, lr=1e-3, steps=500_000))])
def test_res_and_model_choose_batch_rate_steps_and_multiscale(monkeypatch, flags, chosen):
    monkeypatch.setattr(train, "has_cuda", lambda: True)
    if chosen is None:
        with pytest.raises(SystemExit):
            train.parse_config(flags.split())
    else:
        config = vars(train.parse_config(flags.split()))
        assert {name: config[name] for name in chosen} == chosen


def test_random_streams_of_training_sampling_and_dropout_differ():
    """The same seed and number give unrelated noise to a training picture and to a sample."""
    _, (training,), _ = train.draw_noise(0, 5, 1, 32, "cpu")
    (drawn,) = sampling.picture_noise(0, [5], 32, "cpu")()
    for shift in range(-4, 5):
        both = torch.stack([training.flatten(), drawn.flatten().roll(shift)])
        assert abs(torch.corrcoef(both)[0, 1]) < .1
    seeds = {sampling.seed_of(purpose, 0, 5, *rest) for purpose in (1, 2, 3) for rest in ((), (1,))}
    assert len(seeds) == 6


def one_line(capsys, main, flags):
    """A wrong call in this process -> what it said, which must be one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    printed, error = capsys.readouterr()
    assert stop.value.code == 2 and error.count("\n") == 1 and error.endswith("\n") and not printed, (printed, error)
    return error


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "flowers"
    run_train(out, "--steps", "1")
    return out
