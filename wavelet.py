"""The 5/3 wavelet of JPEG 2000 as first and last layer (Section 3.3, Figure 7).

Without it a 512 x 512 picture means 512 x 512 feature maps: most of the memory and time, for the
least of the content. The wavelet exchanges pixels for channels, loses nothing, and noise still
lives in pixel space. By lifting, along one axis, no rounding:

    d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2        detail: what the neighbours do not predict
    s[n] = x[2n] + (d[n-1] + d[n]) / 4            low band: the picture at half size, same scale

Borders by symmetric extension, x[N] = x[N-2] and d[-1] = d[0]. Undoing the two steps in reverse
order inverts them exactly. `python wavelet.py` draws Figure 7 into assets/.
"""
import torch
import torch.nn.functional as F


def lift(x):
    """One level along the last axis: (..., N), N even -> s, d: (..., N / 2) each."""
    even, odd = x[..., 0::2], x[..., 1::2]
    even_next = torch.cat([even[..., 1:], even[..., -1:]], -1)    # x[2n+2], and x[N] = x[N-2]
    d = odd - (even + even_next) / 2
    d_prev = torch.cat([d[..., :1], d[..., :-1]], -1)             # d[n-1], and d[-1] = d[0]
    return even + (d_prev + d) / 4, d


def unlift(s, d):
    """Inverse of `lift`: s, d: (..., N / 2) -> (..., N)."""
    d_prev = torch.cat([d[..., :1], d[..., :-1]], -1)
    even = s - (d_prev + d) / 4
    even_next = torch.cat([even[..., 1:], even[..., -1:]], -1)
    odd = d + (even + even_next) / 2
    return torch.stack([even, odd], -1).flatten(-2)


def dwt(x, levels):
    """Wavelet transform (Figure 7): (B, C, H, W) -> (B, C 4^levels, H / 2^levels, W / 2^levels).

    Only the low band is transformed again; the finer bands are folded (space to depth) to the
    coarsest size. Channels: low band first, then the bands from coarse to fine, each level in the
    order detail along x, along y, along both. Linear and differentiable.
    """
    if levels == 0:
        return x
    assert x.shape[-2] % 2**levels == 0 and x.shape[-1] % 2**levels == 0, \
        f"{levels} levels need H and W divisible by {2**levels}, not {x.shape[-2]} x {x.shape[-1]}"
    (ss, sd), (ds, dd) = ([band.mT for band in lift(half.mT)] for half in lift(x))
    fine = torch.cat([ds, sd, dd], 1)
    return torch.cat([dwt(ss, levels - 1), F.pixel_unshuffle(fine, 2**(levels - 1))], 1)


def idwt(y, levels):
    """Inverse of `dwt`: (B, C 4^levels, h, w) -> (B, C, h 2^levels, w 2^levels)."""
    if levels == 0:
        return y
    assert y.shape[1] % 4**levels == 0, f"{levels} levels need C 4^{levels} channels, not {y.shape[1]}"
    c = y.shape[1] // 4
    ss, fine = idwt(y[:, :c], levels - 1), F.pixel_shuffle(y[:, c:], 2**(levels - 1))
    ds, sd, dd = fine.chunk(3, 1)
    return unlift(unlift(ss.mT, sd.mT).mT, unlift(ds.mT, dd.mT).mT)
