"""v-prediction and the losses (Sections 2 and 3.2, Appendix A).

    v = alpha eps - sigma x,   x = alpha z_t - sigma v,   eps = sigma z_t + alpha v

The network returns v_hat. The loss is the squared error of eps_hat with weight 1, t ~ U(0, 1).
In large pictures nearly all of that error is fine detail. The multiscale loss adds the error after
averaging to 32 x 32, 64 x 64, ... . The best eps_hat is the same: the mean of eps given z_t.
"""
import torch.nn.functional as F

from schedule import alpha_sigma


def v_from_x_eps(x, eps, alpha, sigma):
    """v = alpha eps - sigma x (Section 2). Pictures: (B, C, H, W); alpha, sigma: (B, 1, 1, 1)."""
    return alpha * eps - sigma * x


def x_from_v(z, v, alpha, sigma):
    """x = alpha z_t - sigma v (Section 2)."""
    return alpha * z - sigma * v


def eps_from_v(z, v, alpha, sigma):
    """eps = sigma z_t + alpha v (Section 2)."""
    return sigma * z + alpha * v


def multiscale_mse(error, coarsest=32):
    """Multiscale loss (Section 3.2): sum over s in {32, 64, ..., d} of (1/s) L^{s x s}.

    L^{s x s} = 1/s^2 || D_s[eps - eps_hat] ||^2, where D_s averages down to s x s.
    D_s multiplies the variance of a white error by (s/d)^2 and leaves a smooth error as it is.
    error: eps - eps_hat, or v - v_hat, (B, C, H, W) -> scalar, a mean over batch and channels.
    Here s = d, d / 2, d / 4, ... down to coarsest (the paper's 32) or the last above it, with
    d = sqrt(H W): for 384 x 640 about 496, 248, 124, 62.
    """
    s = (error.shape[-2] * error.shape[-1]) ** 0.5
    loss = error.square().mean() / s                    # the mean over pixels is the 1/s^2
    while s / 2 >= coarsest:
        error, s = F.avg_pool2d(error, 2), s / 2        # D_s: averages of averages
        loss = loss + error.square().mean() / s
    return loss


def diffusion_loss(model, x, t, eps, schedule, cond=None, kind="eps", multiscale=False,
                   coarsest=32, weight=None):
    """The training loss at times t (Section 2).

    model: (z, logsnr, cond) -> v_hat;  x, eps: (B, C, H, W), x in [-1, 1], eps unit noise;
    t: (B,) in [0, 1];  schedule: t -> logsnr (B,);  cond: handed to the model;
    kind: "eps", the error of eps_hat (the paper's text), or "v", the error of v_hat (the paper's
    settings for ImageNet); the one is alpha times the other: eps - eps_hat = alpha (v - v_hat);
    multiscale: the sum over scales, down to coarsest, in place of the plain mean;
    weight: t -> w(t), (B, 1, 1, 1); None means w = 1, as in the paper. Returns a scalar.
    """
    assert kind in ("eps", "v"), f"kind must be 'eps' or 'v', not {kind!r}"
    logsnr = schedule(t)
    alpha, sigma = alpha_sigma(logsnr)
    z = alpha * x + sigma * eps                                     # Eq. 1
    v_hat = model(z, logsnr, cond).float()
    if kind == "eps":
        error = eps - eps_from_v(z, v_hat, alpha, sigma)
    else:
        error = v_from_x_eps(x, eps, alpha, sigma) - v_hat
    if weight is not None:
        error = error * weight(t).sqrt()                            # it is squared below
    return multiscale_mse(error, coarsest) if multiscale else error.square().mean()
