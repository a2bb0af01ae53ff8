"""From the paper's successor, not in the paper: Simpler Diffusion (SiD2, arXiv 2410.19324).

A weight of the loss and a U-ViT with fewer skips: `train.py --loss sid2 --set skips=level`.
"""
import math

import numpy as np
import torch

from uvit import UViT

BIAS = {128: 0.0, 256: -1.0, 512: -3.0, 1024: -4.0}         # side of the pictures: b


def sigmoid_weight(t, schedule, d, b=None):
    """Weight of the squared error of eps: w(t) = -1/2 dlogsnr/dt sigmoid(b - logsnr).

    The slope makes it an integral over logsnr; the sigmoid is 1 where logsnr is well below b, and
    falls above it, where the error of eps is mostly invisible detail.
    t: (B,);  schedule: t -> logsnr;  d: side of the pictures, by which b goes if that is None
    -> w: (B, 1, 1, 1).
    """
    if b is None:
        b = float(np.interp(math.log2(d), [math.log2(side) for side in BIAS], [*BIAS.values()]))
    logsnr, slope = torch.func.jvp(schedule, (t,), (torch.ones_like(t),))   # and its derivative
    return (-slope / 2 * torch.sigmoid(b - logsnr))[:, None, None, None]


class ResidualUViT(UViT):
    """U-ViT with one skip per stage in place of one per ResBlock: up(h - h_after) + h_before.

    h_before and h_after: the maps on the way down, before and after the pooling of that stage.
    """

    skip_per_block = False

    def go_down(self, h, emb):
        skips = []
        for blocks, pool in zip(self.down, self.pool):
            for block in blocks:
                h = block(h, emb)
            skips.append((h, pool(h)))
            h = skips[-1][1]
        return h, skips

    def go_up(self, h, emb, skips):
        for upsample, blocks in zip(self.upsample, self.up):
            before, after = skips.pop()
            h = upsample(h - after) + before
            for block in blocks:
                h = block(h, emb)
        return h
