"""Noise schedules of *simple diffusion* (Sections 2 and 3.1).

    z_t = alpha_t x + sigma_t eps,  alpha^2 + sigma^2 = 1,  t = 0 is data, t = 1 is noise  (Eq. 1)
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
SCHEDULES = "cosine", "shifted", "interpolated"


def sides(res):
    """Height and width of a picture in pixels: 64 -> (64, 64), "384x640" -> (384, 640)."""
    height, width, *_ = [int(side) for side in str(res).split("x")] * 2
    return height, width


def side(res):
    """d of a picture that is d x d, sqrt(H W) of one that is H x W: 64 -> 64."""
    return math.sqrt(math.prod(sides(res)))


def logsnr_cosine(t):
    """Cosine schedule, alpha = cos(pi t / 2), t rescaled so that its ends are finite (Section 2).

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


def logsnr_schedule(name, res, noise_d=32):
    """The schedule called `name` for a picture of size res, a function t: (B,) -> logsnr: (B,)."""
    d = side(res)
    return {"cosine": logsnr_cosine,
            "shifted": lambda t: logsnr_shifted(t, d, noise_d),
            "interpolated": lambda t: logsnr_interpolated(t, d, noise_d)}[name]


def alpha_sigma(logsnr):
    """alpha^2 = sigmoid(logsnr), sigma^2 = sigmoid(-logsnr) (Section 2): variance is preserved.

    logsnr: (B,) -> alpha, sigma: (B, 1, 1, 1) each, ready to multiply pictures.
    """
    logsnr = logsnr[:, None, None, None]
    return torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()


# ---------------------------------------------------------------------------- Figures 3 and 5

def plot(curves, size, y_range, title):
    """Curves over t in [0, 1] as a PIL picture. curves: {name: ((N,) values, colour)}."""
    from PIL import Image, ImageDraw, ImageFont
    w, h, scale, margin = size[0] * 4, size[1] * 4, 4, 120        # drawn at 4x, then reduced
    sheet = Image.new("RGB", (w, h), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13 * scale)
    low, high = y_range
    at = lambda t, y: (margin + t * (w - margin - 40),
                       h - margin - (y - low) / (high - low) * (h - 2 * margin))
    draw.rectangle([at(0, high), at(1, low)], outline="#bbbbbb", width=scale)
    if low < 0 < high:
        draw.line([at(0, 0), at(1, 0)], fill="#dddddd", width=scale)
    for y in (low, (low + high) / 2, high):
        draw.text((margin - 12, at(0, y)[1]), f"{y:g}", fill="black", font=font, anchor="rm")
    for t in (0, .5, 1):
        draw.text((at(t, low)[0], h - margin + 14), f"{t:g}", fill="black", font=font, anchor="mt")
    draw.text((w / 2, 30), title, fill="black", font=font, anchor="mt")
    for i, (name, (values, colour)) in enumerate(curves.items()):
        values = values.clamp(low, high).tolist()
        points = [at(k / (len(values) - 1), y) for k, y in enumerate(values)]
        draw.line(points, fill=colour, width=2 * scale, joint="curve")
        place = margin + 30, h - margin - 30 - 60 * (len(curves) - 1 - i)
        draw.text(place, name, colour, font, "ls", stroke_width=8, stroke_fill="white")
    return sheet.resize(size, Image.Resampling.LANCZOS)


def main():
    import numpy as np
    import torch.nn.functional as F
    from PIL import Image
    from data import draw_flower

    # Figure 3: a 512 x 512 picture, t = 0 ... 1, averaged to 64 x 64: cosine above, shifted below.
    flower, _ = draw_flower(np.random.default_rng(2), 6, 512)
    x = torch.from_numpy(flower).permute(2, 0, 1)[None] * 2 - 1
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, 1, 9)
    side, gap = 96, 4
    strip = Image.new("RGB", (len(t) * (side + gap) - gap, 2 * side + gap), "white")
    for row, name in enumerate(("cosine", "shifted")):
        alpha, sigma = alpha_sigma(logsnr_schedule(name, 512, 64)(t))
        for column in range(len(t)):
            z = F.avg_pool2d(alpha[column] * x + sigma[column] * eps, 8)[0]
            pixels = ((z + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
            tile = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
            strip.paste(tile, (column * (side + gap), row * (side + gap)))
    t, curves = torch.linspace(0, 1, 400), {}
    for name, dark, light in (("cosine", "#1f5fa8", "#8fb8e6"), ("shifted", "#b3401f", "#eba58f")):
        alpha, sigma = alpha_sigma(logsnr_schedule(name, 512, 64)(t))
        curves[f"alpha, {name}"] = alpha.flatten(), dark
        curves[f"sigma, {name}"] = sigma.flatten(), light
    beside = plot(curves, (360, strip.height), (0, 1), "alpha and sigma over t, 512 x 512")
    sheet = Image.new("RGB", (strip.width + 12 + beside.width, strip.height), "white")
    sheet.paste(strip, (0, 0))
    sheet.paste(beside, (strip.width + 12, 0))
    sheet.save("assets/figure3.png")

    # Figure 5: logsnr over t at 512 x 512.
    plot({"cosine": (logsnr_cosine(t), "#333333"),
          "shifted to 256": (logsnr_shifted(t, 512, 256), "#1f5fa8"),
          "shifted to 32": (logsnr_shifted(t, 512, 32), "#b3401f"),
          "interpolated 32 to 256": (logsnr_interpolated(t, 512), "#2c8a4b")},
         (480, 360), (-25, 25), "logsnr over t, 512 x 512").save("assets/figure5.png")
    print("assets/figure3.png and assets/figure5.png")


if __name__ == "__main__":
    main()
