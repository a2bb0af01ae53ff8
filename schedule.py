"""Noise schedules (Sections 2 and 3.1): how noisy a picture is at time t.

    z_t = alpha_t x + sigma_t eps,  alpha_t^2 + sigma_t^2 = 1                       (Eq. 1)
    logsnr(t) = log(alpha_t^2 / sigma_t^2),  t = 0 is data, t = 1 is noise

Averaging s x s pixels multiplies the signal-to-noise ratio by s^2 (Eq. 4). With the same schedule
at every size, the coarse content of a large picture is visible at nearly all t, so that few t train
the network to draw it. Lowering logsnr by 2 log(d / noise_d) undoes this: averaged to noise_d x
noise_d, a d x d picture is then as noisy as one of noise_d x noise_d with cosine (Eq. 5).
The network's only time input is logsnr. `python figures.py` draws these curves.
"""
import math

import torch

LOGSNR_MIN, LOGSNR_MAX = -15.0, 15.0
SCHEDULES = "cosine", "shifted", "interpolated"


def height_width(res):
    """Size of a picture in pixels: 64 -> (64, 64), "384x640" -> (384, 640)."""
    sides = [int(pixels) for pixels in str(res).split("x")]
    return sides[0], sides[-1]


def mean_side(res):
    """Side d of a picture; if not square, sqrt(height width), our choice: "384x640" -> 495.7."""
    height, width = height_width(res)
    return math.sqrt(height * width)


def logsnr_cosine(t):
    """Cosine schedule, alpha = cos(pi t / 2), with t rescaled so that logsnr is finite (Section 2).

    t: (B,) in [0, 1], float32 or float64 -> logsnr: (B,), from 15 at t = 0 down to -15 at t = 1.
    """
    # bfloat16 would round t = 0.999 to 1 and lose the noisy end of the schedule.
    assert t.dtype in (torch.float32, torch.float64), f"t must be float32 or float64, not {t.dtype}"
    t_min, t_max = math.atan(math.exp(-LOGSNR_MAX / 2)), math.atan(math.exp(-LOGSNR_MIN / 2))
    return -2 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_shifted(t, d, noise_d=32):
    """Shifted schedule (Eq. 5): SNR_cosine(t) (noise_d / d)^2.

    t: (B,) in [0, 1]; d: side of the picture in pixels -> logsnr: (B,).
    """
    return logsnr_cosine(t) + 2 * math.log(noise_d / d)


def logsnr_interpolated(t, d, noise_d_low=32, noise_d_high=256):
    """Interpolated schedule (Eq. 6): shifted to noise_d_low at t = 1, to noise_d_high at t = 0.

    As printed, Eq. 6 has t and 1 - t the other way round. At d = 512 that leaves logsnr above 0,
    where fine detail can be seen, for only 4% of t. In this form it is 20%, closer to the stated
    aim of equal weight for low and high frequencies.
    t: (B,) in [0, 1]; d: side of the picture in pixels -> logsnr: (B,).
    """
    return t * logsnr_shifted(t, d, noise_d_low) + (1 - t) * logsnr_shifted(t, d, noise_d_high)


def logsnr_schedule(name, res, noise_d=32):
    """A schedule by its name, for pictures of size res: a function t (B,) -> logsnr (B,).

    noise_d: that of "shifted", or the noise_d_low of "interpolated"; "cosine" has none.
    """
    d = mean_side(res)
    return {"cosine": logsnr_cosine,
            "shifted": lambda t: logsnr_shifted(t, d, noise_d),
            "interpolated": lambda t: logsnr_interpolated(t, d, noise_d_low=noise_d)}[name]


def alpha_sigma(logsnr):
    """alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr) (Section 2).

    logsnr: (B,) -> alpha, sigma: (B, 1, 1, 1) each, to multiply pictures with.
    """
    logsnr = logsnr[:, None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
