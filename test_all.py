"""The sentences of the paper and the promises of the trainer, in the paper's order.

    pytest test_all.py            about a minute on two CPU cores; with -v, an abstract of the paper
    pytest tests                  the rest, a quarter of an hour: options, files, kills, ranks,
                                  pictures, captions, the U-Net, SiD2, benchmarks

Each formula is compared with an independent oracle: a closed form, a slow loop, or numpy.
benchmarks/mutants.py breaks the code one line at a time and shows which test turns red.
"""
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
import data
import flowers
import loss as losses
import noise
import run
import sample as sampling
import schedule
import text
import train
import uvit
import wavelet
from tests.helpers import (PYTHON, SMALL, TORCHRUN, TRAIN, assert_same_bits, assert_same_run,
                           condition, last_checkpoint, log_lines, random_weights, run_ranks,
                           run_script, run_train, same_to_rounding, small_uvit, write_folder)

TIMES = torch.tensor([0, 1e-3, .5, .999, 1], dtype=torch.float64)


def angle_of(logsnr):
    """phi with alpha = cos phi and sigma = sin phi."""
    return np.arctan(np.exp(-np.asarray(logsnr) / 2))


def np_logsnr_cosine(t):
    """The clipped cosine by its definition, alpha = cos, sigma = sin: an oracle in numpy."""
    low, high = angle_of(15), angle_of(-15)
    angle = low + np.asarray(t, np.float64) * (high - low)
    return np.log(np.cos(angle) ** 2 / np.sin(angle) ** 2)


# ------------------------------------------- Section 2: the process, v-prediction and the loss

def test_cosine_schedule_is_log_of_cos_over_sin_and_clipped_at_15():
    ours = schedule.logsnr_cosine(TIMES).numpy()
    assert np.allclose(ours, np_logsnr_cosine(TIMES), rtol=0, atol=1e-9)
    assert np.allclose(ours[[0, 2, 4]], [15, 0, -15], atol=1e-9)
    assert abs(ours[3] - -12.31) < .01      # not the -15.25 of a schedule in bfloat16


def test_variance_is_preserved_and_logsnr_is_log_alpha2_over_sigma2():
    logsnr = torch.linspace(-20, 20, 41, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(logsnr)
    assert alpha.shape == sigma.shape == (41, 1, 1, 1)
    assert torch.allclose(alpha**2 + sigma**2, torch.ones_like(alpha), atol=1e-12)
    assert torch.allclose(torch.log(alpha**2 / sigma**2).flatten(), logsnr, atol=1e-9)


def one_batch(size=8, batch=4):
    """x, t, eps, and an error to add to v_hat."""
    x = torch.rand(batch, 3, size, size, dtype=torch.float64) * 2 - 1
    eps, off = torch.randn(2, batch, 3, size, size, dtype=torch.float64)
    return x, torch.linspace(.1, .9, batch, dtype=torch.float64), eps, off


def test_network_is_given_z_of_eq_1_logsnr_and_the_condition():
    x, t, eps, _ = one_batch()
    given = []
    model = lambda *args: given.extend(args) or torch.zeros_like(x)
    losses.diffusion_loss(model, x, t, eps, schedule.logsnr_cosine, cond="condition")
    z, logsnr, cond = given
    angle = angle_of(np_logsnr_cosine(t))[:, None, None, None]
    assert np.allclose(z, np.cos(angle) * x.numpy() + np.sin(angle) * eps.numpy(), atol=1e-9)
    assert np.allclose(logsnr, np_logsnr_cosine(t), atol=1e-9) and cond == "condition"


def test_v_x_and_eps_are_one_rotation():
    x, _, eps, _ = one_batch()
    angle = torch.linspace(.1, 1.5, 4, dtype=torch.float64)[:, None, None, None]
    alpha, sigma = angle.cos(), angle.sin()
    z, v = alpha * x + sigma * eps, losses.v_from_x_eps(x, eps, alpha, sigma)
    later = (angle + 1e-6).cos() * x + (angle + 1e-6).sin() * eps
    assert torch.allclose(v, (later - z) / 1e-6, atol=1e-5)         # v is dz / d angle
    assert torch.allclose(losses.x_from_v(z, v, alpha, sigma), x, atol=1e-12)
    assert torch.allclose(losses.eps_from_v(z, v, alpha, sigma), eps, atol=1e-12)


class Perfect:
    """A model that knows x: v_hat = (alpha z - x) / sigma, by numpy; `off` is added to v_hat."""

    def __init__(self, x, off=0.0):
        self.x, self.off = x, off

    def __call__(self, z, logsnr, cond=None):
        angle = torch.from_numpy(angle_of(logsnr.double()))[:, None, None, None]
        return (angle.cos() * z - self.x) / angle.sin() + self.off


@pytest.mark.parametrize("kind", ["eps", "v"])
@pytest.mark.parametrize("scales", [False, True], ids=["plain", "multiscale"])
def test_perfect_model_has_zero_loss(kind, scales):
    x, t, eps, off = one_batch(64)
    loss = lambda model: losses.diffusion_loss(model, x, t, eps, schedule.logsnr_cosine,
                                               kind=kind, multiscale=scales)
    assert loss(Perfect(x)) < 1e-10
    assert loss(Perfect(x, off)) > 1e-3


def test_eps_mse_is_alpha_squared_v_mse():
    x, _, eps, off = one_batch()
    for t in (.2, .5, .8):
        t = torch.full((4,), t, dtype=torch.float64)
        mse = {kind: losses.diffusion_loss(Perfect(x, off), x, t, eps, schedule.logsnr_cosine,
                                           kind=kind).item() for kind in ("eps", "v")}
        assert np.isclose(mse["v"], off.square().mean().item(), rtol=1e-6)
        alpha = np.cos(angle_of(np_logsnr_cosine(t)[0]))
        assert np.isclose(mse["eps"], alpha**2 * mse["v"], rtol=1e-6)


# ---------------------------------------------------------- Section 3.1: the schedule is shifted

def test_averaging_multiplies_snr_by_s_squared():
    """Eq. 4 on noise: averaged over s x s, z at the shifted logsnr has the SNR of the cosine
    schedule at noise_d.
    """
    d, noise_d, t = 256, 64, torch.tensor([.3], dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(schedule.logsnr_shifted(t, d, noise_d))
    z = alpha * .5 + sigma * torch.randn(64, 1, d, d, dtype=torch.float64)
    averaged = F.avg_pool2d(z, d // noise_d)
    snr = (averaged.mean() / .5) ** 2 / averaged.var()
    assert abs(np.log(snr.item()) - np_logsnr_cosine(.3)) < .02


@pytest.mark.parametrize("d, noise_d", [(64, 64), (128, 32), (512, 64), (256, 256), (96, 32)])
def test_shift_is_two_log_ratio(d, noise_d):
    ours = schedule.logsnr_shifted(TIMES, d, noise_d)
    shift = ours - schedule.logsnr_cosine(TIMES)
    assert torch.allclose(shift, torch.full_like(shift, 2 * np.log(noise_d / d)), atol=1e-9)
    by_eq_5 = np.exp(np_logsnr_cosine(TIMES)) * (noise_d / d) ** 2
    assert np.allclose(ours.exp().numpy(), by_eq_5, rtol=1e-9)
    default = schedule.logsnr_shifted(TIMES, d)
    assert torch.equal(default, schedule.logsnr_shifted(TIMES, d, 32))


@pytest.mark.parametrize("d", [256, 512])
def test_interpolated_is_shift_32_at_noise_and_shift_256_at_data(d):
    ours = schedule.logsnr_interpolated(TIMES, d).numpy()           # Eq. 6
    low, high = (np_logsnr_cosine(TIMES) + 2 * np.log(n / d) for n in (32, 256))
    t = TIMES.numpy()
    assert np.allclose(ours, t * low + (1 - t) * high, atol=1e-9)
    assert np.isclose(ours[-1], low[-1]) and np.isclose(ours[0], high[0])
    assert (ours[1:] < ours[:-1]).all()


# ------------------------------------------------------------ Section 3.2: the multiscale loss

def test_pooled_unit_noise_from_256_to_32_has_variance_1_64():
    """The loss of unit noise is the sum over s of (1/s) (s/256)^2: at s = 32 the variance 1/64."""
    eps = torch.randn(16, 3, 256, 256)
    assert abs(F.avg_pool2d(eps, 8).var().item() * 64 - 1) < .02
    finer = sum((s / 256) ** 2 / s for s in (64, 128, 256))
    assert abs((losses.multiscale_mse(eps).item() - finer) * 32 * 64 - 1) < .1


def test_multiscale_weights_by_hand():
    """64 x 64: (1/64) mean e^2 + (1/32) mean (2 x 2 means)^2. A constant error counts fully in
    both, a checkerboard of single pixels only in the first.
    """
    loss = lambda *args: losses.multiscale_mse(*args).item()
    board = torch.ones(1, 1, 64, 64)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = -1
    assert math.isclose(loss(torch.full((1, 1, 64, 64), 2.0)), 4 / 64 + 4 / 32, rel_tol=1e-6)
    assert math.isclose(loss(-board), 1 / 64, rel_tol=1e-6)
    coarser = F.interpolate(board, scale_factor=2)
    assert math.isclose(loss(coarser), 1 / 128 + 1 / 64, rel_tol=1e-6)
    assert math.isclose(loss(torch.ones(1, 1, 32, 128)), 1 / 64 + 1 / 32, rel_tol=1e-6)
    assert math.isclose(loss(coarser.abs(), 16), 1 / 128 + 1 / 64 + 1 / 32 + 1 / 16, rel_tol=1e-6)


# ------------------------------------------------- Section 3.3: a wavelet as first and last layer

def slow_lift(x, floor=False):
    """5/3 lifting of a list, index by index, borders mirrored; with `floor` as JPEG 2000's
    reversible transform has it.
    """
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
    """(H, W) -> [low band, then details along x, y, both, from coarse to fine], each (h, w)."""
    if levels == 0:
        return [x]
    rows = [slow_lift(list(row), floor) for row in x]
    bands = {}
    for k, along_x in enumerate("sd"):
        half = np.array([row[k] for row in rows])
        columns = [slow_lift(list(column), floor) for column in half.T]
        for k, along_y in enumerate("sd"):
            bands[along_x + along_y] = np.array([column[k] for column in columns]).T
    return slow_dwt(bands["ss"], levels - 1, floor) + [bands["ds"], bands["sd"], bands["dd"]]


def bands_of(y, levels):
    """(4^levels, h, w), channels of dwt -> the bands of slow_dwt: space to depth undone by slices.
    """
    bands, channel = [y[0]], 1
    for level in range(levels, 0, -1):
        fold = 2 ** (levels - level)
        for _ in range(3):
            band = np.zeros((y.shape[1] * fold, y.shape[2] * fold), y.dtype)
            for row in range(fold):
                for column in range(fold):
                    band[row::fold, column::fold] = y[channel]
                    channel += 1
            bands.append(band)
    return bands


@pytest.mark.parametrize("levels, H, W", [(1, 6, 10), (1, 2, 2), (2, 8, 12), (3, 16, 8), (2, 4, 4)])
def test_wavelet_is_the_5_3_lifting_of_a_slow_loop(levels, H, W):
    x = np.random.default_rng(0).normal(size=(2, 3, H, W))
    y = wavelet.dwt(torch.from_numpy(x), levels)
    assert y.shape == (2, 3 * 4**levels, H // 2**levels, W // 2**levels)
    for i in range(2):
        ours = bands_of(wavelet.dwt(torch.from_numpy(x[i:i + 1, :1]), levels)[0].numpy(), levels)
        for a, b in zip(ours, slow_dwt(x[i, 0], levels), strict=True):
            assert np.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2])
def test_wavelet_is_jpeg_2000_reversible_on_integers(levels):
    """Where all divisions are exact, the floors of JPEG 2000 change nothing; elsewhere each
    lifting step differs by less than one.
    """
    x = np.random.default_rng(1).integers(0, 256, (16, 16))
    exact = x * 64**levels                  # each level divides by 2 and 4 along both axes
    y = wavelet.dwt(torch.from_numpy(exact)[None, None].double(), levels)
    for a, b in zip(bands_of(y[0].numpy(), levels), slow_dwt(exact, levels, True), strict=True):
        assert np.array_equal(a, b)
    for row, *ours in zip(x, *wavelet.lift(torch.from_numpy(x).double(), -1)):
        for a, b in zip(ours, slow_lift(row.tolist(), floor=True)):
            assert np.abs(a.numpy() - b).max() < 1


def test_wavelet_has_the_taps_of_the_5_3_filter_bank():
    """Also at the borders, where the signal is mirrored about its first and last sample."""
    x = np.random.default_rng(2).normal(size=64)
    s, d = (band.numpy() for band in wavelet.lift(torch.from_numpy(x), -1))
    mirrored = np.pad(x, 2, mode="reflect")
    low = np.convolve(mirrored, np.array([-1, 2, 6, 2, -1]) / 8, "valid")
    high = np.convolve(mirrored[1:-1], np.array([-1, 2, -1]) / 2, "valid")
    assert np.allclose(s, low[::2], atol=1e-12) and np.allclose(d, high[1::2], atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize("H, W", [(8, 8), (16, 8), (24, 40), (64, 64)])
def test_wavelet_inverts(H, W, levels):
    x = torch.randn(2, 3, H, W)
    assert (wavelet.idwt(wavelet.dwt(x, levels), levels) - x).abs().max() < 1e-5
    y = torch.randn(2, 4**levels, H // 2**levels, W // 2**levels)
    assert (wavelet.dwt(wavelet.idwt(y, levels), levels) - y).abs().max() < 1e-4


def test_wavelet_of_two_levels_turns_512_x_512_x_3_into_128_x_128_x_48():
    assert wavelet.dwt(torch.zeros(1, 3, 512, 512), 2).shape == (1, 48, 128, 128)


@pytest.mark.parametrize("res, levels, top", [
    (16, 0, 16), (32, 0, 32), (64, 0, 64), (128, 0, 128), (256, 1, 128), (384, 2, 96),
    (512, 2, 128), (1024, 3, 128)])
def test_largest_map_is_never_above_128(res, levels, top):
    with torch.device("meta"):
        model = small_uvit(res)
        maps = []
        model.project_in.register_forward_hook(lambda m, args, out: maps.append(out.shape[2:]))
        assert model(torch.zeros(1, 3, res, res), torch.zeros(1)).shape == (1, 3, res, res)
    assert model.wavelet_levels == levels and maps == [(top, top)]
    assert model.position.shape[-1] in range(9, 17)


# ------------------------------------- Sections 3.3 to 3.5 and Appendix B: dropout and the U-ViT

@torch.no_grad()
@pytest.mark.parametrize("dropout_res, dropped", [
    (16, {16}), (32, {32, 16}), (64, {64, 32, 16}), (0, {16})])
def test_dropout_acts_only_at_its_levels(dropout_res, dropped):
    model = random_weights(small_uvit(64, dropout=.5, dropout_res=dropout_res)).float()
    acts = {}                               # side of a map: whether dropout changes it

    def hook(module, args, out):
        side = out.shape[-1] if out.dim() == 4 else math.isqrt(out.shape[1])
        acts.setdefault(side, set()).add(not torch.equal(args[0], out))

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(hook)
    model.train()(torch.randn(2, 3, 64, 64), torch.zeros(2))
    assert acts == {side: {side in dropped} for side in (64, 32, 16)}
    acts.clear()
    model.eval()(torch.randn(2, 3, 64, 64), torch.zeros(2))
    assert acts == {64: {False}, 32: {False}, 16: {False}}


def normalised(x):
    """Mean 0 and variance 1 over the last axis."""
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()


def group_norm(x, norm):
    plain = normalised(x.reshape(len(x), norm.num_groups, -1)).reshape(x.shape)
    return plain * norm.weight[:, None, None] + norm.bias[:, None, None]


def layer_norm(x, norm):
    return normalised(x) * norm.weight + norm.bias


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def swish(x):
    return x / (1 + torch.exp(-x))


@torch.no_grad()
def test_resblock_is_film_and_an_added_normalised_skip():
    block = random_weights(uvit.ResBlock(16, 8, 0.0, has_skip=True))
    x, skip = torch.randn(2, 2, 16, 6, 6, dtype=torch.float64)
    emb = torch.randn(2, 8, dtype=torch.float64)
    h = (group_norm(x, block.norm_in) + group_norm(skip, block.norm_skip)) / 2**.5
    h = F.conv2d(swish(h), block.conv_in.weight, block.conv_in.bias, padding=1)
    film = linear(emb, block.film)
    scale, shift = film[:, :16, None, None], film[:, 16:, None, None]
    h = swish(group_norm(h, block.norm_film) * (1 + scale) + shift)
    by_hand = x + F.conv2d(h, block.conv_out.weight, block.conv_out.bias, padding=1)
    assert torch.allclose(block(x, emb, skip), by_hand)


@torch.no_grad()
def test_mlp_block_is_film_on_4_c_hidden_units_after_swish():
    block = random_weights(uvit.MLPBlock(8, 6, 0.0))
    x, emb = torch.randn(2, 5, 8).double(), torch.randn(2, 6).double()
    film = linear(emb, block.film)[:, None]
    h = swish(linear(layer_norm(x, block.norm), block.linear_in))
    h = h * (1 + film[..., :32]) + film[..., 32:]
    assert torch.allclose(block(x, emb), x + linear(h, block.linear_out))


@torch.no_grad()
def test_attention_normalises_q_and_k_per_head():
    block = random_weights(uvit.AttentionBlock(8, 4)).float()       # q, k: normalised in float32
    x, out = torch.randn(1, 5, 8), torch.zeros(5, 8)
    qkv = linear(layer_norm(x, block.norm), block.qkv)[0]
    rms = lambda a, norm: a / a.square().mean(-1, keepdim=True).sqrt() * norm.weight
    for head in (0, 1):
        q, k, v = (qkv[:, 8 * part + 4 * head:8 * part + 4 * head + 4] for part in range(3))
        scores = rms(q, block.norm_q) @ rms(k, block.norm_k).T / 4**.5
        out[:, 4 * head:4 * head + 4] = torch.softmax(scores, -1) @ v
    assert torch.allclose(block(x), x + linear(out, block.linear_out), atol=1e-4)


@torch.no_grad()
def test_attention_mixes_all_tokens_and_mlp_none():
    mlp, attention = (random_weights(block).float() for block in
                      (uvit.MLPBlock(32, 16, 0.0), uvit.AttentionBlock(32, 16)))
    x = torch.randn(1, 9, 32)
    other = x.clone()
    other[0, 4] += torch.randn(32)
    changed = lambda a, b: ((a - b).abs().amax(-1).flatten() > 1e-6).tolist()
    emb = torch.ones(1, 16)
    assert changed(mlp(x, emb), mlp(other, emb)) == [i == 4 for i in range(9)]
    assert all(changed(attention(x), attention(other)))


@torch.no_grad()
def test_embedding_is_sinusoids_of_logsnr_through_two_layers_plus_the_class():
    embedding = uvit.Embedding(8, 3)
    logsnr, label = torch.tensor([-3.0, 10.0]), torch.tensor([2, 0])
    periods = torch.tensor([1, 100 ** (1 / 3), 100 ** (2 / 3), 100])
    angle = logsnr[:, None] * 2 * math.pi / periods
    h = swish(linear(torch.cat([angle.sin(), angle.cos()], 1), embedding.linear_in))
    h = linear(h, embedding.linear_out) + embedding.label.weight[label]
    assert torch.allclose(embedding(logsnr, condition(label)), swish(h), atol=1e-5)


@torch.no_grad()
def test_down_is_average_pool_and_projection_and_up_is_projection_and_nearest():
    model, x, low = small_uvit(), torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4)
    project = lambda h, layer: torch.einsum("oc,bchw->bohw", layer.weight[..., 0, 0], h) \
        + layer.bias[:, None, None]
    (_, down), (up, _) = model.pool[0], model.upsample[0]
    averages = x.reshape(1, 32, 4, 2, 4, 2).mean((3, 5))
    assert torch.allclose(model.pool[0](x), project(averages, down), atol=1e-5)
    squares = project(low, up)[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
    assert torch.allclose(model.upsample[0](low), squares.reshape(1, 32, 8, 8), atol=1e-5)


@torch.no_grad()
def test_transformer_is_mlp_then_attention_on_256_tokens_with_positions_of_deviation_0_01():
    model, calls = small_uvit(64), []
    for module in model.modules():
        if isinstance(module, (uvit.MLPBlock, uvit.AttentionBlock)):
            module.register_forward_hook(lambda module, args, out: calls.append(
                (type(module).__name__, tuple(out.shape))))
    model(torch.randn(1, 3, 64, 64), torch.zeros(1))
    assert calls == [("MLPBlock", (1, 256, 64)), ("AttentionBlock", (1, 256, 64))] * 2
    assert model.position.shape == (1, 64, 16, 16) and abs(model.position.std() / .01 - 1) < .05


@torch.no_grad()
def test_each_resblock_has_a_skip_popped_in_reverse_order():
    model, given, taken = random_weights(small_uvit(64)).float(), [], []
    z, logsnr = torch.randn(2, 3, 64, 64), torch.zeros(2)
    down, up = ([block for level in levels for block in level] for levels in (model.down, model.up))
    hooks = [block.register_forward_hook(lambda m, args, out: given.append(out.data_ptr()))
             for block in down]
    hooks += [block.norm_skip.register_forward_pre_hook(
        lambda m, args: taken.append(args[0].data_ptr())) for block in up]
    out = model(z, logsnr)
    assert len(given) == len(down) == len(up) == 3 and taken == given[::-1]
    for hook in hooks:
        hook.remove()
    for block in up:
        hook = block.norm_skip.register_forward_pre_hook(
            lambda m, args: (torch.zeros_like(args[0]),))
        assert (model(z, logsnr) - out).abs().max() > 1e-5
        hook.remove()
    assert torch.equal(model(z, logsnr), out)


@torch.no_grad()
def test_logsnr_class_and_position_change_the_output():
    model = random_weights(small_uvit()).float()
    z, logsnr, label = torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([1, 2])
    out = model(z, logsnr, condition(label))
    assert (model(z, logsnr + 1, condition(label)) - out).abs().max() > 1e-4
    assert (model(z, logsnr, condition(label + 1)) - out).abs().max() > 1e-4
    none = model(z, logsnr)
    assert torch.equal(none, model(z, logsnr, condition([-1, -1])))
    for k in range(10):                     # to have no class is unlike each of them
        assert (model(z, logsnr, condition([k, k])) - none).abs().max() > 1e-4
    model.position.data = model.position.data.flip(-1)
    assert (model(z, logsnr, condition(label)) - out).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["laptop", "small"])   # the others are the same code, but larger
def test_output_is_zero_at_the_start(name):
    model = uvit.UViT(64, **uvit.PRESETS[name]["network"], classes=3)
    v_hat = model(torch.randn(1, 3, 64, 64), torch.zeros(1), condition([0]))
    assert v_hat.shape == (1, 3, 64, 64) and v_hat.abs().max() == 0


# Millions of weights at 512 x 512 with 1,000 classes; that of `paper` is called 2B there.
PARAMETERS = {"laptop": 4.0, "tiny": 3.0, "mini": 7.8, "small": 49.1, "base": 360.6,
              "paper": 2455.8}


@pytest.mark.parametrize("name", uvit.PRESETS)
def test_preset_has_the_parameter_count_of_the_table(name):
    with torch.device("meta"):
        model = uvit.UViT(512, **uvit.PRESETS[name]["network"], classes=1000)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - PARAMETERS[name]) < .06


# -------------------------------------------------------- Section 3.6: captions, and 384 x 640

@torch.no_grad()
def test_caption_is_read_by_cross_attention_which_leaves_out_padding():
    block = random_weights(text.CrossAttentionBlock(8, 4, 6)).float()
    x, words = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    value = linear(layer_norm(words, block.norm_text), block.kv)[:, :1, 8:]
    only_first = torch.tensor([[True, False, False]]).expand(2, 3)  # whose value is the average
    by_hand = x + linear(value, block.linear_out)
    assert torch.allclose(block(x, words, only_first), by_hand, atol=1e-5)
    assert not torch.allclose(block(x, words, torch.ones(2, 3).bool()), by_hand, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("way", ["cross-attention", "embedding"])
def test_words_and_their_order_change_the_output_by_both_ways_and_padding_does_not(way):
    model = random_weights(small_uvit(text=text.ByteEncoder(12, 64))).float().eval()
    for layer in [model.embedding.text[1]] if way == "cross-attention" else \
            [cross_attention.linear_out for _, _, cross_attention in model.transformer]:
        uvit.zero(layer)                    # the other way
    z, logsnr = torch.randn(1, 3, 32, 32), torch.zeros(1)
    draw = lambda caption: model(z, logsnr, condition(tokens=[text.byte_tokens(caption, 12)]))
    out = draw("red on blue")
    for caption in ("blue on red", "red on blu", ""):
        assert (draw(caption) - out).abs().max() > 1e-4
    assert torch.equal(draw(""), model(z, logsnr))              # no caption is the empty one
    model.text.position.weight[1 + len("red on blue"):] += 1    # of the padding
    assert torch.equal(draw("red on blue"), out)


def test_384_x_640_is_a_96_x_160_map_and_a_12_x_20_transformer():
    with torch.device("meta"):
        model, maps = uvit.UViT("384x640", **uvit.PRESETS["small"]["network"]), []
        model.project_in.register_forward_hook(lambda m, args, out: maps.append(out.shape))
        assert model(torch.zeros(1, 3, 384, 640), torch.zeros(1)).shape == (1, 3, 384, 640)
    assert model.wavelet_levels == 2 and maps == [(1, 96, 96, 160)]
    assert model.position.shape[2:] == (12, 20)


# ------------------------------------------------------ Appendix A: the sampler and guidance

class Exact:
    """The exact denoiser of known data: x_hat(z) = E[x | z], as v_hat in float64. Notes its calls.
    """

    def __init__(self, posterior_mean):
        self.posterior_mean, self.calls = posterior_mean, []

    def __call__(self, z, logsnr, cond=None):
        self.calls.append((z, logsnr))
        angle = torch.atan(torch.exp(-logsnr / 2))[:, None, None, None]
        x_hat = self.posterior_mean(z, angle.cos(), angle.sin())
        return (angle.cos() * z - x_hat) / angle.sin()


def gaussian(mean, deviation):
    def posterior_mean(z, alpha, sigma):
        gain = alpha * deviation**2 / (alpha**2 * deviation**2 + sigma**2)
        return mean + gain * (z - alpha * mean)
    return Exact(posterior_mean)


def two_points(a, b, weight_of_b):
    def posterior_mean(z, alpha, sigma):
        log_odds = math.log(weight_of_b / (1 - weight_of_b)) \
            + ((z - alpha * a) ** 2 - (z - alpha * b) ** 2) / (2 * sigma**2)
        return a + (b - a) * torch.sigmoid(log_odds)
    return Exact(posterior_mean)


def draw(model, count, steps, **options):
    """`count` numbers, as pictures of one pixel, from the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    unit = lambda: torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=generator)
    return sampling.sample(model, schedule.logsnr_cosine, unit, steps, **options)


FIRST_ORDER = [("ancestral", 0.0), ("ancestral", 0.2), ("ancestral", 1.0), ("ddim", 0.0)]
all_samplers = pytest.mark.parametrize("sampler, gamma", [*FIRST_ORDER, ("dpm", 0.0), ("sde", 0.0)])


@all_samplers
def test_sampler_recovers_two_points_and_their_weights(sampler, gamma):
    x = draw(two_points(-.6, .8, .3), 10_000, 100, sampler=sampler, gamma=gamma)
    assert torch.minimum((x + .6).abs(), (x - .8).abs()).max() < .02
    assert abs((x > 0).double().mean().item() - .3) < .02


def two_gaussians(weights, means, deviation):
    """Posterior mean of a mixture; its probability flow keeps quantiles: the exact sample."""
    def posterior_mean(z, alpha, sigma):
        variance = alpha**2 * deviation**2 + sigma**2
        odds = [w * torch.exp(-(z - alpha * m) ** 2 / (2 * variance))
                for w, m in zip(weights, means)]
        each = [m + alpha * deviation**2 / variance * (z - alpha * m) for m in means]
        return sum(p * x for p, x in zip(odds, each)) / sum(odds)

    def exact_sample(z):
        """x with the same quantile among the data as z has in unit noise, by bisection."""
        normal, low, high = statistics.NormalDist(), -2.0, 2.0
        for _ in range(60):
            x = (low + high) / 2
            below = sum(w * normal.cdf((x - m) / deviation) for w, m in zip(weights, means))
            low, high = (x, high) if below < normal.cdf(z) else (low, x)
        return x
    return Exact(posterior_mean), exact_sample


@pytest.mark.parametrize("sampler, order", [("ddim", 1), ("dpm", 2)])
def test_half_the_step_makes_the_error_2_to_the_order_smaller(sampler, order):
    model, exact_sample = two_gaussians((.4, .6), (-.4, .35), .2)
    start = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None, None, None]
    exact = torch.tensor([exact_sample(z) for z in start.flatten().tolist()])
    uniform = lambda t: 15 - 30 * t.double()            # steps of logsnr of equal length
    drawn = [sampling.sample(model, uniform, lambda: start, steps, sampler=sampler).flatten()
             for steps in (40, 80, 160)]
    errors = [(x - exact).square().mean().sqrt().item() for x in drawn]
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < .3, errors


@pytest.mark.parametrize("sampler, order", [("ancestral", 1), ("ddim", 1), ("dpm", 2), ("sde", 2)])
def test_half_the_step_makes_the_error_of_the_deviation_2_to_the_order_smaller(sampler, order):
    """On Gaussian data x is linear in the noises: entry i sees the i-th alone, times .01."""
    uniform, errors = lambda t: 15 - 30 * t.double(), []
    for steps in (80, 160, 320):
        noises = iter(.01 * torch.eye(steps, dtype=torch.float64)[..., None, None, None])
        x = sampling.sample(gaussian(0, .2), uniform, lambda: next(noises), steps, sampler=sampler,
                            gamma=float(sampler == "sde"))              # which has no gamma
        errors.append(abs(100 * x.square().sum().sqrt().item() - .2))
        assert len(list(noises)) == (0 if sampler in ("ancestral", "sde") else steps - 1)   # unused
    for coarse, fine in zip(errors, errors[1:]):
        assert abs(math.log2(coarse / fine) - order) < .3, errors


def test_x_hat_is_extrapolated_to_the_middle_of_the_step_in_logsnr():
    """x_hat is linear in logsnr here; the steps are of unequal length."""
    a, b = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    before, t, s = (torch.full((2,), logsnr, dtype=torch.float64) for logsnr in (-5., -4., -1.))
    assert torch.allclose(sampling.x_mid_step(a - 4 * b, t, s, a - 5 * b, before), a - 2.5 * b)


@pytest.mark.parametrize("sampler", ["dpm", "sde"])
def test_nothing_is_extrapolated_where_guidance_begins_or_ends(monkeypatch, sampler):
    """x_hat jumps there, which is no slope."""
    used, steps = [], 12
    monkeypatch.setattr(sampling, "x_mid_step",
                        lambda x_hat, logsnr, *args: used.append(logsnr[0].item()) or x_hat)
    sampling.sample(ClassAsNumber(), schedule.logsnr_cosine, lambda: torch.zeros(2, 1, 1, 1), steps,
                    condition([3, 4]), sampler, guidance=2.0, interval=(-2.0, 1.0))
    logsnr = np_logsnr_cosine([1 - i / steps for i in range(steps)])
    inside = [-2 <= value <= 1 for value in logsnr]
    jumps = [i == 0 or inside[i] != inside[i - 1] for i in range(steps - 1)]
    expected = [value for value, jump in zip(logsnr, jumps) if not jump]
    assert sum(jumps) == 3 and np.allclose(used, expected, atol=1e-4)


@pytest.mark.parametrize("first, last, width, shift", [
    (-99, 9.0, 3.0, 0), (-2.3, 7.5, 1.5, -2), (.5, 9.0, 3.0, -8)])
def test_asinh_spacing_is_even_in_asinh_of_the_distance_to_the_middle(first, last, width, shift):
    """It is within the schedule, from -15 to 15, shifted. At its beginning the mean of 8 x 8
    pixels, whose noise has an eighth of the deviation, has the logsnr `first`. In the middle 32 x
    32 pixels would have 0: 16 times as many.
    """
    logsnr = sampling.asinh_spacing(lambda t: schedule.logsnr_cosine(t) + shift, 8, first, last,
                                    width)(torch.linspace(1, 0, 11)).double()
    largest = min(math.exp(7.5 - shift / 2), 8 * math.exp(-first / 2))      # sigma / alpha
    assert abs(logsnr[0] + 2 * math.log(largest)) < 1e-4
    assert abs(logsnr[-1] - min(last, 15 + shift)) < 1e-4
    ratio = (logsnr - math.log(16)) / width             # asinh x = log(x + sqrt(x^2 + 1))
    even = torch.log(ratio + (ratio**2 + 1).sqrt()).diff()
    assert (even / even.mean() - 1).abs().max() < 1e-4


@pytest.mark.parametrize("sampler, gamma", FIRST_ORDER)
def test_sampler_steps_are_those_of_bayes_rule(sampler, gamma):
    """A few coarse steps on Gaussian data, where z stays Gaussian: mean and variance by recursion.

    The oracle is Bayes' rule for z_s given z_t and x, in terms of alpha_t|s and sigma_t|s; for
    DDIM, the same eps_hat at s.
    """
    m, d, steps = .1, .2, 6
    mean, variance = 0.0, 1.0
    for i in range(steps):
        angle_t, angle_s = (angle_of(np_logsnr_cosine(1 - k / steps)) for k in (i, i + 1))
        a_t, s_t, a_s, s_s = np.cos(angle_t), np.sin(angle_t), np.cos(angle_s), np.sin(angle_s)
        gain = a_t * d**2 / (a_t**2 * d**2 + s_t**2)    # x_hat = m + gain (z - a_t m)
        if i == steps - 1:
            of_z, of_x, added = 0.0, 1.0, 0.0           # the last step is x_hat
        elif sampler == "ddim":
            of_z, of_x, added = s_s / s_t, a_s - s_s * a_t / s_t, 0.0
        else:
            a_ts, s_ts2 = a_t / a_s, s_t**2 - (a_t / a_s) ** 2 * s_s**2
            of_z, of_x = a_ts * s_s**2 / s_t**2, a_s * s_ts2 / s_t**2
            added = s_ts2**gamma * (s_ts2 * s_s**2 / s_t**2) ** (1 - gamma)
        mean = (of_z + of_x * gain) * mean + of_x * (1 - gain * a_t) * m
        variance = (of_z + of_x * gain) ** 2 * variance + added
    x = draw(gaussian(m, d), 400_000, steps, sampler=sampler, gamma=gamma)
    assert abs(x.mean().item() - mean) < .002
    assert abs(x.var().item() / variance - 1) < .01


@all_samplers
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_sampler_makes_exactly_steps_calls_on_a_uniform_grid(steps, sampler, gamma):
    model = gaussian(0, .2)
    draw(model, 3, steps, sampler=sampler, gamma=gamma)
    times = [1 - i / steps for i in range(steps)]
    asked = [logsnr[0].item() for _, logsnr in model.calls]
    assert len(asked) == steps and np.allclose(asked, np_logsnr_cosine(times), atol=1e-3)


@all_samplers
def test_last_step_is_x_hat_clipped(sampler, gamma):
    for mean in (.3, 5.0):
        model = gaussian(mean, .2)
        x = draw(model, 50, 5, sampler=sampler, gamma=gamma)
        z, logsnr = model.calls[-1]
        angle = torch.atan(torch.exp(-logsnr / 2))[:, None, None, None]
        x_hat = model.posterior_mean(z, angle.cos(), angle.sin())
        assert torch.allclose(x, x_hat.clamp(-1, 1), atol=1e-6)
    assert torch.equal(x, torch.ones_like(x))


class ClassAsNumber:
    """v_hat is the number of the class, and 10 without a class: guidance by hand."""

    def __call__(self, z, logsnr, cond):
        self.batch = len(z)
        value = torch.where(cond.label < 0, 10, cond.label).to(z.dtype)
        return value[:, None, None, None].expand_as(z)


def test_guidance_1_is_the_conditional_model_and_any_other_one_call_of_both():
    model, z, cond = ClassAsNumber(), torch.zeros(2, 1, 1, 1), condition([3, 4])
    for scale in (1, 0, 2.5):
        eta = scale - 1
        by_hand = torch.tensor([(1 + eta) * c - eta * 10.0 for c in (3, 4)])
        v_hat = sampling.guided(model, z, torch.zeros(2), cond, scale)
        assert torch.allclose(v_hat.flatten(), by_hand)
        assert model.batch == (2 if scale == 1 else 4)


def test_guidance_on_v_is_guidance_on_eps():
    """The paper combines eps_hat, ours v_hat: at any angle eps = sin z + cos v of both agree."""
    model, z, eta = ClassAsNumber(), torch.randn(2, 1, 1, 1), 1.5
    v_cond, v_uncond = torch.tensor([3.0, 4])[:, None, None, None], torch.full((2, 1, 1, 1), 10.0)
    v_hat = sampling.guided(model, z, torch.zeros(2), condition([3, 4]), 1 + eta)
    for angle in (.2, .9, 1.4):
        eps = lambda v: math.sin(angle) * z + math.cos(angle) * v
        assert torch.allclose(eps(v_hat), (1 + eta) * eps(v_cond) - eta * eps(v_uncond), atol=1e-5)


def test_guidance_drops_class_and_caption_and_keeps_the_orientation():
    cond = condition([3, 4], [1, 0], [[7, 8, 0], [9, 0, 0]])
    label, portrait, tokens = cond.dropped(torch.tensor([True, True]))
    assert label.tolist() == [-1, -1] and tokens.tolist() == [[0] * 3] * 2
    assert portrait.tolist() == [1, 0]
    label, portrait, tokens = cond.dropped(torch.tensor([False, True]))
    assert label.tolist() == [3, -1] and tokens.tolist() == [[7, 8, 0], [0, 0, 0]]


def test_guidance_on_an_interval_of_logsnr_and_nowhere_else():
    """Of the paper's successor, SiD2."""
    calls = []

    def model(z, logsnr, cond):
        calls.append((len(z), logsnr[0].item(), logsnr.std().item()))
        return torch.zeros_like(z)

    sampling.sample(model, schedule.logsnr_cosine, lambda: torch.ones(2, 1, 1, 1), 20,
                    condition([1, 2]), guidance=3.0, interval=(-2, 1.5))
    batches, logsnrs, spreads = zip(*calls)
    assert np.allclose(logsnrs, np_logsnr_cosine(np.linspace(1, 0, 21)[:20]), atol=1e-4)
    assert batches == tuple(4 if -2 <= logsnr <= 1.5 else 2 for logsnr in logsnrs)
    assert set(batches) == {2, 4} and set(spreads) == {0}


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = noise.picture_noise(3, range(4), 8, "cpu")
    alone = noise.picture_noise(3, [2], 8, "cpu")
    for _ in range(2):
        assert torch.equal(together()[2], alone()[0])
    assert not torch.equal(together()[0], together()[0])
    unit = noise.picture_noise(3, range(64), 32, "cpu")()
    assert abs(unit.mean()) < .01 and abs(unit.std() - 1) < .01


# ------------------------------------------------------------------- Appendix B: the trainer

def test_trainer_overfits_one_batch(tmp_path, little):
    """Eight pictures of one colour each: the trained model removes nearly all noise from them."""
    for i in range(8):
        colour = tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{i}.png")
    run_train(tmp_path / "run", "--data", tmp_path, "--res", 16, "--steps", 400, "--log-every", 10,
              "--lr", 3e-3, "--seed", 1, "--set", "warmup=20", "blocks_16=1")
    loss = [line["loss"] for line in log_lines(tmp_path / "run")]
    assert loss[0] > .2 and np.mean(loss[-10:]) < .1 * loss[0]


def start_of(saved):
    """The weights that a run began with, by name."""
    torch.manual_seed(saved["config"]["seed"])
    return checkpoint.build_network(**saved["network"]).state_dict()


def test_first_step_is_adam_with_warm_up_and_clipping(tmp_path, little):
    """It is lr times the sign of the gradient; Adam's moments are 1 - beta of the clipped gradient
    and of its square.
    """
    saved = run_train(tmp_path, "--steps", 1, "--lr", .01, "--set", "warmup=5", "clip=0.25")
    start = start_of(saved)
    moved = torch.cat([(saved["model"][name] - start[name]).flatten().abs() for name in start])
    moved = moved[moved > 0]
    assert moved.max() < .01 / 5 * 1.001 and moved.median() > .01 / 5 * .999 and len(moved) > 100
    (line,) = log_lines(tmp_path)
    assert line["norm"] > .25 and line["lr"] == .01 / 5
    state = saved["optimizer"]["state"].values()
    norm = math.sqrt(sum(moments["exp_avg"].square().sum().item() for moments in state))
    assert math.isclose(norm, (1 - .9) * .25, rel_tol=1e-3)
    square = sum(moments["exp_avg_sq"].sum().item() for moments in state)
    assert math.isclose(square, (1 - .99) * .25**2, rel_tol=1e-3)


def test_adams_eps_is_1e_12(tmp_path, little):
    """A step is lr g / (|g| + eps): where |g| is at most 1e-9, an eps of 1e-8 would move little."""
    saved = run_train(tmp_path, "--steps", 1, "--lr", .01, "--set", "warmup=1", "clip=1e-9")
    start = start_of(saved)
    moved = torch.cat([(start[name] - saved["model"][name]).flatten() for name in start])
    g = torch.cat([moments["exp_avg"].flatten() / (1 - .9)
                   for moments in saved["optimizer"]["state"].values()])
    large = g.abs() > 1e-12
    assert large.sum() > 100
    by_hand = .01 * g / (g.abs() + 1e-12)
    torch.testing.assert_close(moved[large], by_hand[large], rtol=.01, atol=1e-6)


def test_ema_equals_the_model_after_step_1_and_then_warms_up(tmp_path, little):
    decays = [train.ema_decay(step, .9999) for step in range(200_000)]
    assert decays[0] == 0 and decays[1] == (1 + 0) / (10 + 0)
    assert decays[100] == (1 + 99) / (10 + 99)
    assert max(decays) == decays[-1] == .9999
    for decay, ema in ((.1, .9999), (.05, .05)):
        flags = "--lr", .1, "--set", f"ema={ema}"
        first = run_train(tmp_path / f"{ema}", "--steps", 1, *flags)
        assert_same_bits(first["ema"], first["model"])
        second = run_train(tmp_path / f"{ema}", "--steps", 2, *flags)
        for name, weights in second["ema"].items():
            by_hand = decay * first["ema"][name] + (1 - decay) * second["model"][name]
            assert torch.allclose(weights, by_hand, rtol=0, atol=1e-6)


def test_first_loss_of_the_trainer_is_that_of_its_schedule_and_loss_by_hand(tmp_path, little):
    """At the start v_hat = 0, so that the loss is known for each schedule and kind of loss."""
    t, eps, _ = noise.draw_noise(0, range(8), 64, "cpu")
    x = torch.stack([flowers.Flowers(64)[n][0] for n in range(8)]) / 127.5 - 1
    cosine = torch.from_numpy(np_logsnr_cosine(t))
    shift_32, shift_256 = (cosine + 2 * math.log(noise_d / 64) for noise_d in (32, 256))
    mse = lambda error: error.square().mean().item()
    multiscale = lambda error: mse(error) / 64 + mse(F.avg_pool2d(error, 2)) / 32
    first_losses = []
    for flags, logsnr, kind, mean in [
            ("", shift_32, "eps", mse),
            ("--schedule cosine", cosine, "eps", mse),
            ("--schedule interpolated", t * shift_32 + (1 - t) * shift_256, "eps", mse),
            ("--set noise_d=64", cosine, "eps", mse),
            ("--loss v", shift_32, "v", mse),
            ("--set multiscale=on", shift_32, "eps", multiscale),
            ("--set multiscale=on coarsest=64", shift_32, "eps", lambda error: mse(error) / 64)]:
        run_train(tmp_path / flags, "--res", 64, "--steps", 1, *flags.split())
        first_losses.append(log_lines(tmp_path / flags)[0]["loss"])
        alpha, sigma = torch.sigmoid(torch.stack([logsnr, -logsnr])).sqrt()[..., None, None, None]
        error = dict(eps=eps - sigma * (alpha * x + sigma * eps), v=alpha * eps - sigma * x)[kind]
        assert math.isclose(first_losses[-1], mean(error), rel_tol=1e-4), flags
    assert all(abs(loss / first_losses[0] - 1) > .01 for loss in first_losses[1:])


def test_labels_are_dropped_for_their_share(tmp_path, little, monkeypatch):
    honest, labels = train.diffusion_loss, []

    def loss(*args, cond, **options):
        labels.append(cond.label)
        return honest(*args, cond=cond, **options)

    monkeypatch.setattr(train, "diffusion_loss", loss)
    for share in (.1, .5):
        labels.clear()
        run_train(tmp_path / f"{share}", "--res", 16, "--steps", 50, "--set", "blocks_16=1",
                  f"drop_label={share}")
        assert abs((torch.cat(labels) == -1).float().mean() - share) < .06


def test_noise_of_a_picture_is_a_function_of_seed_and_number():
    t, eps, u = noise.draw_noise(5, range(10, 14), 8, "cpu")
    (t_12,), (eps_12,), (u_12,) = noise.draw_noise(5, [12], 8, "cpu")
    assert t[2] == t_12 and u[2] == u_12 and torch.equal(eps[2], eps_12)
    t, eps, u = noise.draw_noise(0, range(4000), 4, "cpu")
    for uniform in (t, u):
        assert abs(uniform.mean() - .5) < .02 and abs(uniform.var() - 1 / 12) < .005
    assert abs(torch.corrcoef(torch.stack([t, u]))[0, 1]) < .05 and abs(eps.std() - 1) < .01


def test_random_streams_of_training_sampling_and_dropout_differ():
    """The same seed and number give unrelated noise to a training picture and to a sample."""
    _, (training,), _ = noise.draw_noise(0, [5], 32, "cpu")
    (drawn,) = noise.picture_noise(0, [5], 32, "cpu")()
    for shift in range(-4, 5):
        both = torch.stack([training.flatten(), drawn.flatten().roll(shift)])
        assert abs(torch.corrcoef(both)[0, 1]) < .1
    streams = noise.TRAINING, noise.SAMPLING, noise.DROPOUT
    assert len({noise.seed_of(stream, 0, 5, *rest) for stream in streams
                for rest in ((), (1,))}) == 6


def test_dropout_has_other_masks_in_each_step(tmp_path, little, monkeypatch):
    masks = []

    def forward(self, x):
        masks.append(F.dropout(torch.ones_like(x), self.p, self.training))
        return x * masks[-1]

    monkeypatch.setattr(torch.nn.Dropout, "forward", forward)
    run_train(tmp_path, "--res", 16, "--steps", 3, "--set", "blocks_16=1", "dropout=.5")
    assert len(masks) == 3 and all(abs((mask == 0).float().mean() - .5) < .02 for mask in masks)
    assert torch.corrcoef(torch.stack(masks).flatten(1)).triu(1).abs().max() < .05


def test_no_picture_is_seen_twice_or_skipped_within_an_epoch_across_a_resume(
        tmp_path, little, monkeypatch):
    write_folder(tmp_path / "set", 24, (32, 32))
    honest, read, given = data.Pictures.picture, [], []
    monkeypatch.setattr(data.Pictures, "picture", lambda self, i: read.append(i) or honest(self, i))
    for start, stop in ((0, 2), (2, 5), (5, 6)):        # 24 files, 8 a step: two epochs
        read.clear()
        run_train(tmp_path / "run", "--data", tmp_path / "set", "--steps", stop)
        assert len(read) == 32 + 8 * (stop - start)     # 16 to see what they are, 16 for reports
        given += read[32:]
    assert sorted(given[:24]) == sorted(given[24:]) == list(range(24)) and given[:24] != given[24:]


def test_accumulation_of_4_parts_of_2_has_the_gradient_of_a_batch_of_8(tmp_path, little):
    whole = run_train(tmp_path / "whole", "--steps", 4)
    parts = run_train(tmp_path / "parts", "--steps", 4, "--accum", 4)
    other = run_train(tmp_path / "other", "--steps", 4, "--seed", 1)
    assert same_to_rounding(whole, parts) and not same_to_rounding(whole, other)


def test_two_ranks_learn_what_one_process_learns(tmp_path, little):
    flags = "--steps", 4, "--set", "drop_label=.5"
    one = run_train(tmp_path / "one", *flags)
    run_ranks(2, TRAIN, *SMALL, *flags, "--accum", 2, "--out", tmp_path / "two")
    assert same_to_rounding(one, last_checkpoint(tmp_path / "two"))
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("one", "two")]
    assert np.allclose(*losses, rtol=1e-5)


def test_stopped_and_resumed_run_equals_an_unbroken_one_to_the_last_bit(tmp_path, little):
    write_folder(tmp_path / "set", 12)
    flags = "--data", tmp_path / "set", "--set", "dropout=.3", "warmup=3"
    run_train(tmp_path / "unbroken", "--steps", 4, *flags)
    for steps in (2, 4):
        run_train(tmp_path / "resumed", "--steps", steps, *flags)
    assert_same_run(tmp_path / "unbroken", tmp_path / "resumed")
    losses = [[line["loss"] for line in log_lines(tmp_path / name)]
              for name in ("unbroken", "resumed")]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_run_writes_two_checkpoints_a_model_a_log_grids_and_a_page(tmp_path, little, monkeypatch):
    monkeypatch.setattr(run, "REPORT_STEPS", 3)
    run_train(tmp_path, "--steps", 3, "--save-every", 1, "--sample-every", 2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "ckpt-00000002.pt", "ckpt-00000003.pt", "grid-0000002.png", "grid-0000003.png", "grid.png",
        "index.html", "log.jsonl", "model.pt"]
    assert Image.open(tmp_path / "grid.png").size == (10 * 32, 4 * 32)      # 10 classes
    reports = log_lines(tmp_path, "loss_by_noise_level")
    assert [line["step"] for line in reports] == [2, 3]
    levels = reports[0]["loss_by_noise_level"]                  # from clean to noisy
    assert len(levels) == 8 and levels[0] > levels[-1] > 0      # little noise is hard to see


def test_compiled_steps_are_the_plain_ones(tmp_path, little, monkeypatch):
    """With the graphs of the forward and backward pass as torch.compile has them. The C++ made of
    these, which takes half a minute, is compared in tests/test_compiled.py.
    """
    compiler, frames = torch.compile, torch._dynamo.utils.counters["frames"]
    monkeypatch.setattr(torch, "compile", lambda function, options, **rest: compiler(
        function, backend="aot_eager", **rest))
    monkeypatch.setattr(run, "compiler_trouble", lambda device: None)
    flags = "--steps", 4, "--set", "blocks_16=1", "dropout=.3"
    plain, before = run_train(tmp_path / "plain", *flags), frames["ok"]
    compiled = run_train(tmp_path / "compiled", *flags, "--compile", "on")
    assert same_to_rounding(plain, compiled) and frames["ok"] > before


# ------------------------------------------------------------------- the commands of the README

def test_torchrun_trains_at_512_with_a_wavelet_and_the_multiscale_loss(tmp_path):
    output = run_script(*TORCHRUN, "train.py", "--res", 512, "--steps", 1, "--batch", 1,
                        "--sample-every", 0, "--out", tmp_path / "run")
    assert "laptop uvit" in output and "512 x 512" in output and "done: " in output
    saved = last_checkpoint(tmp_path / "run")
    assert saved["step"] == 1 and saved["config"]["multiscale"]
    assert saved["model"]["project_in.weight"].shape[1] == 48


def test_train_py_trains_and_sample_py_draws_with_what_it_learned(tmp_path):
    model = tmp_path / "run/model.pt"
    output = run_script(*PYTHON, "train.py", "--res", 16, "--batch", 8, "--steps", 2,
                        "--sample-every", 0, "--out", model.parent)
    assert f"python sample.py --ckpt {model}" in output
    run_script(*PYTHON, "sample.py", "--ckpt", model, "--n", 2, "--steps", 2,
               "--out", tmp_path / "samples")
    for i in (0, 1):
        assert Image.open(tmp_path / f"samples/{i:06d}.png").size == (16, 16)
    assert np.load(tmp_path / "samples/samples.npz")["arr_0"].shape == (2, 16, 16, 3)
