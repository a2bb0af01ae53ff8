"""The 5/3 wavelet of JPEG 2000 as first and last layer (Section 3.3, Figure 7).

In a convolutional network a 512 x 512 picture means 512 x 512 feature maps, which take most of the
memory and time although they hold only fine detail. The wavelet exchanges pixels for channels and
loses nothing. One level along one axis is two "lifting" steps (JPEG 2000 also rounds to integers):

    d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2      detail: odd samples less what their neighbours say
    s[n] = x[2n] + (d[n-1] + d[n]) / 4          low band: x at half the size, as bright as x

Borders are mirrored: x[N] = x[N-2] and d[-1] = d[0]. Each step adds to one half of the samples a
function of the other half, so that subtracting the same in reverse order undoes both steps. The
paper does not say whether the bands are scaled; here they are not.
"""
import torch
import torch.nn.functional as F


def following(even, dim):
    """x[2n] -> x[2n+2]; after the last even sample it is repeated: x[N] = x[N-2]."""
    n = even.shape[dim]
    return torch.cat([even.narrow(dim, 1, n - 1), even.narrow(dim, n - 1, 1)], dim)


def preceding(d, dim):
    """d[n] -> d[n-1]; before the first one it is repeated: d[-1] = d[0]."""
    n = d.shape[dim]
    return torch.cat([d.narrow(dim, 0, 1), d.narrow(dim, 0, n - 1)], dim)


def lift(x, dim):
    """One level along dim (-1 or -2), of even length: (..., N, ...) -> s, d: (..., N / 2, ...)."""
    pairs = x.unflatten(dim, (-1, 2))         # dim = -2: (..., N, W) -> (..., N / 2, 2, W)
    even, odd = pairs.unbind(dim)
    d = odd - (even + following(even, dim)) / 2
    s = even + (preceding(d, dim) + d) / 4
    return s, d


def unlift(s, d, dim):
    """Inverse of `lift`, dim -1 or -2: s, d: (..., N / 2, ...) -> (..., N, ...)."""
    even = s - (preceding(d, dim) + d) / 4
    odd = d + (even + following(even, dim)) / 2
    pairs = torch.stack([even, odd], dim)   # dim = -2: (..., N / 2, W) twice -> (..., N / 2, 2, W)
    return pairs.flatten(dim - 1, dim)


def dwt(x, levels):
    """Wavelet transform (Figure 7): (B, C, H, W) -> (B, C 4^levels, H / 2^levels, W / 2^levels).

    Each level transforms the low band of the level before; finer bands are brought to the coarsest
    size by space to depth. Channels: the low band, then details from coarse to fine, each level in
    the order along x, along y, along both. Linear and differentiable.
    """
    if levels == 0:
        return x
    H, W, k = *x.shape[-2:], 2**levels
    assert H % k == W % k == 0, f"{levels} levels need sides divisible by {k}, not {H} x {W}"
    s, d = lift(x, -1)
    ss, sd = lift(s, -2)                # first letter: low or detail along x; second: along y
    ds, dd = lift(d, -2)
    details = [F.pixel_unshuffle(band, 2 ** (levels - 1)) for band in (ds, sd, dd)]
    return torch.cat([dwt(ss, levels - 1), *details], 1)


def idwt(y, levels):
    """Inverse of `dwt`: (B, C 4^levels, h, w) -> (B, C, h 2^levels, w 2^levels)."""
    if levels == 0:
        return y
    assert y.shape[1] % 4**levels == 0, \
        f"{levels} levels need C 4^{levels} channels, not {y.shape[1]}"
    coarser, *details = y.split(y.shape[1] // 4, 1)     # equal quarters: dwt of ss; ds, sd, dd
    ss = idwt(coarser, levels - 1)
    ds, sd, dd = (F.pixel_shuffle(band, 2 ** (levels - 1)) for band in details)
    return unlift(unlift(ss, sd, -2), unlift(ds, dd, -2), -1)
