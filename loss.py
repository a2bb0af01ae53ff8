"""v-prediction and the losses (Sections 2 and 3.2, Appendix A).

The network returns v_hat. The loss is the plain squared error of eps, weight w(t) = 1, t ~ U(0, 1).
For large pictures that error is dominated by detail, so the multiscale loss adds the same error
after averaging down to 32 x 32, 64 x 64, ..., which keeps the optimum (averaging is linear).
"""
import numpy as np
import torch
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


def multiscale_mse(eps_hat, eps):
    """Multiscale loss (Section 3.2): sum over s in {32, 64, ..., d} of (1/s) L^{s x s}.

    L^{s x s} = 1/s^2 || D_s[eps] - D_s[eps_hat] ||^2, D_s averages down to s x s.
    eps_hat, eps: (B, C, H, W), d = sqrt(H W) -> scalar, the mean over batch and channels.
    """
    error, total = eps - eps_hat, 0.0
    while True:
        s = (error.shape[-2] * error.shape[-1]) ** 0.5
        total = total + error.square().mean() / s
        if s < 64:
            return total
        error = F.avg_pool2d(error, 2)      # an average of averages is D of the next scale


def sigmoid_weight(t, logsnr, d, b=None):
    """Weight of the successor (SiD2, arXiv 2410.19324): -1/2 dlogsnr/dt sigmoid(b - logsnr).

    t: (B,); logsnr: a schedule; d: side of the pictures, by which b goes if it is None
    -> w: (B, 1, 1, 1), for the error of eps. Over logsnr (dlogsnr/dt is the change of variable)
    half of ||eps - eps_hat||^2 is left where logsnr << b, of exp(b) ||x - x_hat||^2 where >> b.
    """
    if b is None:
        b = np.interp(np.log2(d), (7, 8, 9, 10), (0, -1, -3, -4)).item()
    logsnr_t, slope = torch.func.jvp(logsnr, (t,), (torch.ones_like(t),))
    return (-slope / 2 * torch.sigmoid(b - logsnr_t))[:, None, None, None]


def diffusion_loss(model, x, t, eps, logsnr, label=None, kind="eps", multiscale=False, b=None):
    """One denoising step, scored (Section 2): what the trainer minimises.

    model: (z, logsnr, label) -> v_hat;  x, eps: (B, C, H, W), x in [-1, 1], eps unit noise;
    t: (B,) in [0, 1];  logsnr: a schedule, t -> (B,);  kind: "eps" (the paper's text), "v" (its
    settings list) or "sid2" (eps with the weight of the paper's successor, b its bias);
    multiscale: the sum over scales in place of the plain mean -> scalar.
    """
    assert kind in ("eps", "v", "sid2"), f"kind must be 'eps', 'v' or 'sid2', not {kind!r}"
    logsnr_t = logsnr(t)
    alpha, sigma = alpha_sigma(logsnr_t)
    z = alpha * x + sigma * eps                                              # Eq. 1
    v_hat = model(z, logsnr_t, label).float()
    target, output = eps, eps_from_v(z, v_hat, alpha, sigma)
    if kind == "v":
        target, output = v_from_x_eps(x, eps, alpha, sigma), v_hat
    if kind == "sid2":
        root = sigmoid_weight(t, logsnr, (x.shape[-2] * x.shape[-1]) ** .5, b).sqrt()
        target, output = root * target, root * output
    return multiscale_mse(output, target) if multiscale else F.mse_loss(output, target)
