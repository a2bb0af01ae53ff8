"""The 5/3 wavelet of JPEG 2000 as first and last layer (Section 3.3, Figure 7).

Without it a 512 x 512 picture means 512 x 512 feature maps: most of the memory and time, for the
least of the content. The wavelet exchanges pixels for channels, loses nothing, and noise still
lives in pixel space. By lifting, along one axis, no rounding:

    d[n] = x[2n+1] - (x[2n] + x[2n+2]) / 2        detail: what the neighbours do not predict
    s[n] = x[2n] + (d[n-1] + d[n]) / 4            low band: the picture at half size, same scale

Borders by symmetric extension, x[N] = x[N-2] and d[-1] = d[0]: there the two neighbours are one
and the same, and its weight is both of theirs. Undoing the two steps in reverse
order inverts them exactly. `python wavelet.py` draws Figure 7 into assets/.
"""
import torch


def around(x, dim):
    """x -> along dim its first, all but its last, all but its first, its last."""
    n = x.shape[dim]
    return [x.narrow(dim, *part) for part in ((0, 1), (0, n - 1), (1, n - 1), (n - 1, 1))]


# The border is a piece of its own, so that a compiler makes one pass of each `cat`: twice as fast
# as shifting even and d by a `cat` first.

def lift(x, dim):
    """One level along dim, -1 or -2: (..., N, ...), N even -> s, d: (..., N / 2, ...) each."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim)
    first, here, following, last = around(even, dim)
    _, odd_here, _, odd_last = around(odd, dim)
    d = torch.cat([odd_here - (here + following) / 2, odd_last - last], dim)
    d_first, d_before, d_here, _ = around(d, dim)
    return torch.cat([first + d_first / 2, following + (d_before + d_here) / 4], dim), d


def unlift(s, d, dim):
    """Inverse of `lift`: s, d: (..., N / 2, ...) -> (..., N, ...)."""
    s_first, _, s_here, _ = around(s, dim)
    d_first, d_before, d_here, d_last = around(d, dim)
    even = torch.cat([s_first - d_first / 2, s_here - (d_before + d_here) / 4], dim)
    _, here, following, last = around(even, dim)
    odd = torch.cat([d_before + (here + following) / 2, d_last + last], dim)
    return torch.stack([even, odd], dim).flatten(dim - 1, dim)


# Space to depth and back: F.pixel_unshuffle and F.pixel_shuffle, which take twice as long on a CPU.

def fold(x, s):
    return x.unflatten(-1, (-1, s)).unflatten(-3, (-1, s)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unfold(y, s):
    return y.unflatten(1, (-1, s, s)).permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def dwt(x, levels):
    """Wavelet transform (Figure 7): (B, C, H, W) -> (B, C 4^levels, H / 2^levels, W / 2^levels).

    Only the low band is transformed again; the finer bands are folded (space to depth) to the
    coarsest size. Channels: low band first, then the bands from coarse to fine, each level in the
    order detail along x, along y, along both. Linear and differentiable.
    s is a low half, d a high one (detail): of ds, x is high and y is low.
    """
    if levels == 0:
        return x
    assert x.shape[-2] % 2**levels == 0 and x.shape[-1] % 2**levels == 0, \
        f"{levels} levels need H and W divisible by {2**levels}, not {x.shape[-2]} x {x.shape[-1]}"
    (ss, sd), (ds, dd) = (lift(half, -2) for half in lift(x, -1))
    return torch.cat([dwt(ss, levels - 1), *(fold(d, 2**(levels - 1)) for d in (ds, sd, dd))], 1)


def idwt(y, levels):
    """Inverse of `dwt`: (B, C 4^levels, h, w) -> (B, C, h 2^levels, w 2^levels)."""
    if levels == 0:
        return y
    assert y.shape[1] % 4**levels == 0, \
        f"{levels} levels need C 4^{levels} channels, not {y.shape[1]}"
    c = y.shape[1] // 4
    ss, *fine = y.split(c, 1)
    ss, (ds, sd, dd) = idwt(ss, levels - 1), (unfold(d, 2**(levels - 1)) for d in fine)
    return unlift(unlift(ss, sd, -2), unlift(ds, dd, -2), -1)


def main():
    """Figure 7: two levels on a flower of ours, the bands first, then what the network gets."""
    import numpy as np
    from PIL import Image
    from data import draw_flower

    flower, _ = draw_flower(np.random.default_rng(2), 6, 256)
    x = torch.from_numpy(flower).permute(2, 0, 1)[None] * 2 - 1
    one, two = dwt(x, 1), dwt(x, 2)

    def tile(band, gain):                   # fine bands are small and signed: amplified about grey
        return ((band[0] * gain + 1) * 127.5).clamp(0, 255).byte().permute(1, 2, 0).numpy()
    bands = np.full((256, 256, 3), 255, np.uint8)                   # the classic nested picture
    for c, (row, column) in enumerate([(0, 0), (0, 64), (64, 0), (64, 64)]):
        bands[row:row + 64, column:column + 64] = tile(two[:, 3 * c:3 * c + 3], 1 if c == 0 else 4)
    for c, (row, column) in enumerate([(0, 128), (128, 0), (128, 128)], start=1):
        bands[row:row + 128, column:column + 128] = tile(one[:, 3 * c:3 * c + 3], 4)
    # The 48 channels as 16 groups of 3: the coarse bands, then the fine ones by place in the fold.
    coarse = [two[:, 3 * c:3 * c + 3] for c in range(4)]
    fine = two[:, 12:].unflatten(1, (3, 3, 4))              # band, colour, place in the fold
    folded = [fine[:, band, :, place] for band in range(3) for place in range(4)]
    channels = np.full((256 + 12, 256 + 12, 3), 255, np.uint8)
    for c, band in enumerate(coarse + folded):
        row, column = c // 4 * 68, c % 4 * 68
        channels[row:row + 64, column:column + 64] = tile(band, 1 if c == 0 else 4)
    sheet = Image.new("RGB", (256 + 24 + 256 + 24 + 268, 268), "white")
    for left, part in ((0, (flower * 255).astype(np.uint8)), (280, bands), (560, channels)):
        sheet.paste(Image.fromarray(part), (left, 6 if part.shape[0] == 256 else 0))
    sheet.save("assets/figure7.png")
    print("assets/figure7.png: the picture, its bands, and the 48 channels the network gets")


if __name__ == "__main__":
    main()
