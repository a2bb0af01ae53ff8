"""schedule.py, loss.py and wavelet.py beside the paper: precision, refusals, sizes, SiD2."""
import math

import pytest
import torch
import torch.nn.functional as F

import loss as losses
import schedule
import sid2
import wavelet

TIMES = torch.tensor([0, 1e-3, .5, .999, 1], dtype=torch.float64)


# ---------------------------------------------------------------------------- schedule.py

@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_schedule_is_float32_under_autocast(name):
    exact = schedule.logsnr_schedule(name, 128)(TIMES)
    with torch.autocast("cpu", torch.bfloat16):
        ours = schedule.logsnr_schedule(name, 128)(TIMES.float())
        assert ours.dtype == torch.float32
        assert torch.allclose(ours.double(), exact, rtol=0, atol=1e-3)
        assert all(part.dtype == torch.float32 for part in schedule.alpha_sigma(ours))


def test_schedule_refuses_bfloat16_times():
    with pytest.raises(AssertionError, match="float32"):
        schedule.logsnr_cosine(torch.zeros(1, dtype=torch.bfloat16))


def test_schedules_by_name_are_the_schedules():
    by_name = lambda *args: schedule.logsnr_schedule(*args)(TIMES)
    assert torch.equal(by_name("cosine", 128), schedule.logsnr_cosine(TIMES))
    assert torch.equal(by_name("shifted", 128, 64), schedule.logsnr_shifted(TIMES, 128, 64))
    assert torch.equal(by_name("interpolated", 128, 64),
                       schedule.logsnr_interpolated(TIMES, 128, 64))


def test_d_of_a_picture_that_is_not_square_is_the_root_of_its_pixels():
    assert schedule.height_width("384x640") == (384, 640)
    assert all(schedule.height_width(res) == (64, 64) for res in (64, "64", "64x64"))
    assert schedule.mean_side("384x640") == pytest.approx((384 * 640) ** .5)
    assert schedule.mean_side(512) == 512
    shift = schedule.logsnr_schedule("shifted", "384x640")(TIMES) - schedule.logsnr_cosine(TIMES)
    assert torch.allclose(shift, torch.full_like(shift, math.log(32 * 32 / (384 * 640))))


# ---------------------------------------------------------------------------- wavelet.py

@pytest.mark.parametrize("levels", [1, 2, 3])
def test_wavelet_inverts_the_smallest_pictures(levels):
    x = torch.randn(1, 1, 2**levels, 2**levels)
    y = wavelet.dwt(x, levels)
    assert y.shape == (1, 4**levels, 1, 1)
    assert (wavelet.idwt(y, levels) - x).abs().max() < 1e-5


def test_wavelet_of_no_levels_is_the_picture():
    x = torch.randn(1, 1, 5, 3)
    assert wavelet.dwt(x, 0) is x and wavelet.idwt(x, 0) is x


def test_wavelet_is_linear():
    x, y = torch.randn(2, 1, 3, 16, 24, dtype=torch.float64)
    together = wavelet.dwt(2 * x - 3 * y, 2)
    assert torch.allclose(together, 2 * wavelet.dwt(x, 2) - 3 * wavelet.dwt(y, 2), atol=1e-12)


def test_wavelet_of_a_constant_picture_has_zero_details_and_keeps_its_scale():
    y = wavelet.dwt(torch.full((1, 1, 16, 16), .7), 3)
    assert torch.allclose(y[:, :1], torch.tensor(.7)) and y[:, 1:].abs().max() < 1e-6


def test_wavelet_inverts_and_treats_both_axes_alike_in_a_picture_that_is_not_square():
    x = torch.randn(1, 3, 32, 80)
    assert torch.allclose(wavelet.idwt(wavelet.dwt(x, 2), 2), x, atol=1e-5)
    low, low_of_transposed = wavelet.dwt(x, 1)[:, :3], wavelet.dwt(x.mT, 1)[:, :3]
    assert torch.allclose(low_of_transposed, low.mT, atol=1e-6)


def test_wavelet_refuses_sizes_that_do_not_divide():
    for size in ((8, 10), (10, 8)):
        with pytest.raises(AssertionError, match="divisible by 4"):
            wavelet.dwt(torch.zeros(1, 3, *size), 2)
    with pytest.raises(AssertionError, match="channels"):
        wavelet.idwt(torch.zeros(1, 15, 8, 8), 2)


def test_wavelet_gradient_is_the_numerical_one():
    x = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: wavelet.dwt(x, 2), x)
    y = torch.randn(1, 16, 1, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y: wavelet.idwt(y, 2), y)


# ---------------------------------------------------------------------------- loss.py, sid2.py

def test_loss_refuses_an_unknown_kind():
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(AssertionError, match="kind"):
        losses.diffusion_loss(None, x, torch.zeros(1), x, schedule.logsnr_cosine, kind="x")


def slope(logsnr, t, h=1e-6):
    """dlogsnr / dt by differences, in float64."""
    return (logsnr(t + h) - logsnr(t - h)) / (2 * h)


@pytest.mark.parametrize("d, b", [(32, 0), (128, 0), (256, -1), (512, -3), (1024, -4),
                                  (256 * 2**.5, -2)])
@pytest.mark.parametrize("name", schedule.SCHEDULES)
def test_sid2_weight_is_minus_half_the_slope_of_logsnr_times_sigmoid_of_b_minus_logsnr(name, d, b):
    t = torch.tensor([.02, .3, .5, .9, .98], dtype=torch.float64)
    logsnr = {"cosine": schedule.logsnr_cosine,
              "shifted": lambda t: schedule.logsnr_shifted(t, d),
              "interpolated": lambda t: schedule.logsnr_interpolated(t, d)}[name]
    by_hand = lambda b: -slope(logsnr, t) / 2 / (1 + torch.exp(logsnr(t) - b))
    with torch.no_grad():                   # as in the reports
        weight = sid2.sigmoid_weight(t, logsnr, d)
    assert weight.shape == (5, 1, 1, 1)
    assert torch.allclose(weight.flatten(), by_hand(b), rtol=1e-6)
    lower = sid2.sigmoid_weight(t, logsnr, d, b - 3.5)
    assert torch.allclose(lower.flatten(), by_hand(b - 3.5), rtol=1e-6)


@pytest.mark.parametrize("scales", [False, True], ids=["plain", "multiscale"])
@pytest.mark.parametrize("H, W, given, b", [
    (64, 64, None, 0), (128, 512, None, -1), (64, 64, -4.0, -4), (128, 512, 0.0, 0)])
def test_sid2_loss_weighs_the_error_of_eps_and_so_by_exp_b_sigmoid_the_error_of_x(
        scales, H, W, given, b):
    x, eps, v_hat = torch.randn(3, 3, 3, H, W, dtype=torch.float64)
    t, d = torch.tensor([.1, .4, .8], dtype=torch.float64), math.sqrt(H * W)
    logsnr = schedule.logsnr_schedule("shifted", f"{H}x{W}")
    weight = lambda t: sid2.sigmoid_weight(t, logsnr, d, given)
    ours = losses.diffusion_loss(lambda *args: v_hat, x, t, eps, logsnr, multiscale=scales,
                                 weight=weight)

    def mean(error):
        if not scales:
            return error.square().mean()
        return sum(F.avg_pool2d(error[None], int(d) // s).square().mean() / s
                   for s in (32, 64, 128, 256) if s <= d)

    by_hand = []
    for i in range(3):
        l, fall = logsnr(t[i]), -slope(logsnr, t[i])
        alpha, sigma = torch.sigmoid(l).sqrt(), torch.sigmoid(-l).sqrt()
        z, v = alpha * x[i] + sigma * eps[i], v_hat[i].float()
        of_eps, of_x = mean(eps[i] - (sigma * z + alpha * v)), mean(x[i] - (alpha * z - sigma * v))
        by_hand.append(fall / 2 * torch.sigmoid(b - l) * of_eps)
        by_x = fall / 2 * math.exp(b) * torch.sigmoid(l - b) * of_x
        assert torch.allclose(by_hand[-1], by_x, rtol=1e-6)
    assert torch.allclose(ours, sum(by_hand) / 3, rtol=1e-5)
