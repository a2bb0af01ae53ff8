"""Noise schedules of *simple diffusion* (Sections 2 and 3.1).

    z_t = alpha_t x + sigma_t eps,   alpha^2 + sigma^2 = 1,   t = 0 is data, t = 1 is noise      (Eq. 1)
    logsnr_t = log(alpha_t^2 / sigma_t^2)

A picture twice as large, at the same signal-to-noise ratio per pixel, is *less* noisy to the eye:
averaging s x s pixels multiplies the SNR by s^2 (Eq. 4), so its coarse content survives until the
very end of the cosine schedule. Shifting logsnr by 2 log(noise_d / d) gives a d x d picture the
noise that a noise_d x noise_d picture would have under the cosine schedule (Eq. 5).

Everything is a function of t; the network never sees t, only logsnr, which is its clock.
`python schedule.py` draws Figures 3 and 5 into assets/.
"""
import math

import torch

LOGSNR_MIN, LOGSNR_MAX = -15.0, 15.0


def logsnr_cosine(t):
    """Cosine schedule, alpha = cos(pi t / 2), clipped to finite ends (Section 2).

    t: (B,) in [0, 1], float32 or float64 -> logsnr: (B,), falling from 15 at t = 0 to -15 at t = 1.
    """
    # In bfloat16 t = 0.999 is t = 1 and the noisy end of the schedule is lost: refuse, never round.
    assert t.dtype in (torch.float32, torch.float64), f"t must be float32 or float64, not {t.dtype}"
    t_min, t_max = math.atan(math.exp(-LOGSNR_MAX / 2)), math.atan(math.exp(-LOGSNR_MIN / 2))
    return -2 * torch.log(torch.tan(t_min + t * (t_max - t_min)))


def logsnr_shifted(t, d, noise_d=32):
    """Shifted schedule (Eq. 5): SNR_cosine(t) (noise_d / d)^2.

    t: (B,) in [0, 1]; d: side of the picture in pixels, sqrt(H W) where it is not square -> (B,).
    """
    return logsnr_cosine(t) + 2 * math.log(noise_d / d)


def logsnr_interpolated(t, d, noise_d_low=32, noise_d_high=256):
    """Interpolated schedule (Eq. 6): the low shift at the noise end, the high one at the data end.

    As printed, Eq. 6 has t and 1 - t the other way round; see "Our choices" in the README.
    t: (B,) in [0, 1]; d: as in `logsnr_shifted` -> (B,).
    """
    return t * logsnr_shifted(t, d, noise_d_low) + (1 - t) * logsnr_shifted(t, d, noise_d_high)


def logsnr_schedule(name, d, noise_d=32):
    """The schedule called `name` for a picture of side d, as a function t: (B,) -> logsnr: (B,)."""
    return {"cosine": logsnr_cosine,
            "shifted": lambda t: logsnr_shifted(t, d, noise_d),
            "interpolated": lambda t: logsnr_interpolated(t, d, noise_d)}[name]


def alpha_sigma(logsnr):
    """alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr) (Section 2): signal and noise, variance preserved.

    logsnr: (B,) -> alpha, sigma: (B, 1, 1, 1) each, ready to multiply pictures.
    """
    logsnr = logsnr[:, None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
