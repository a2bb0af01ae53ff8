"""The U-Net that the paper compares with (Appendix B): `--set architecture=unet`.

ResBlocks on each level down to 8 x 8 and, one more per level, back up; on maps of side 16 or less
each is followed by self-attention. Skips, one per ResBlock and one per level, are added, as in the
U-ViT. It is made of the U-ViT's parts.
"""
import math

import torch.nn as nn
import torch.nn.functional as F

from schedule import height_width, mean_side
from uvit import (AttentionBlock, Condition, Embedding, ResBlock, Upsample, group_norm,
                  input_output_layers, patch_levels)
from wavelet import dwt, idwt

# The paper's table: multiples of `channels`, and ResBlocks, one of each per level. The rows
# of 128 and 256 see pixels, that of 512 a wavelet of two levels. Smaller pictures start further
# down the row.
UNETS = {128: ((1, 2, 4, 8, 8), (3, 4, 4, 12, 4)),
         256: ((1, 1, 2, 4, 8, 8), (1, 2, 2, 4, 12, 4)),
         512: ((2, 3, 4, 8, 8), (3, 3, 4, 12, 4))}
PAPER_TRAINING = dict(batch=512, steps=2_000_000, lr=5e-5, warmup=10_000)      # at 256 and 512


class MapAttention(AttentionBlock):
    """Self-attention among the pixels of a map: (B, C, H, W) -> same."""

    def forward(self, x):
        return super().forward(x.flatten(2).mT).mT.reshape(x.shape)


class UNet(nn.Module):
    """U-Net: z (B, 3, H, W), logsnr (B,), a Condition or None -> v_hat, shaped as z.

    channels: the width of a level is this times its multiple in UNETS; blocks_16: ResBlocks on the
    way down at 16 x 16, 12 in the paper, which varies this number; the others: see UViT.
    """

    text = None

    def __init__(self, res, channels, head_dim, emb_dim, dropout=0.1, patch="dwt", dropout_res=16,
                 classes=0, portrait=False, blocks_16=12):
        super().__init__()
        d = mean_side(res)
        multiples, blocks = UNETS[128 if d <= 128 else 256 if d <= 256 else 512]
        levels = patch_levels(res) if len(blocks) == 5 and patch != "none" else 0
        depth = 2 + max(0, math.ceil(math.log2(d / 2**levels / 16)))            # down to 8 x 8
        multiples = (multiples[:1] * depth + multiples)[-depth:]
        blocks = (blocks[:1] * depth + blocks)[-depth:-2] + (blocks_16, blocks[-1])
        widths = [channels * multiple for multiple in multiples]
        widths[0] = max(widths[0], min(128, 6 * 4**levels))     # as in uvit.py
        step = 2 ** (levels + depth - 1)
        assert all(side % step == 0 for side in height_width(res)), \
            f"{step} must divide the sides of {res}"

        def level(i, count, has_skip):
            size = d / 2 ** (levels + i)
            drop = dropout if size <= dropout_res else 0.0
            return nn.ModuleList(nn.ModuleList([
                ResBlock(widths[i], emb_dim, drop, has_skip),
                MapAttention(widths[i], head_dim) if size <= 16 else nn.Identity()])
                for _ in range(count))

        self.wavelet_levels = levels if patch == "dwt" else 0
        self.project_in, self.project_out = input_output_layers(patch, levels, widths[0])
        self.embedding = Embedding(emb_dim, classes, portrait)
        self.down = nn.ModuleList(level(i, n, False) for i, n in enumerate(blocks))
        self.up = nn.ModuleList(level(i, n + 1, True) for i, n in enumerate(blocks))[::-1]
        pairs = list(zip(widths, widths[1:]))
        self.pool = nn.ModuleList([nn.Identity()] + [
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(C, below, 1)) for C, below in pairs])
        self.upsample = nn.ModuleList([
            nn.Sequential(nn.Conv2d(below, C, 1), Upsample()) for C, below in pairs[::-1]
        ] + [nn.Identity()])
        self.norm_out = group_norm(widths[0])

    def forward(self, z, logsnr, cond=None):
        emb, skips = self.embedding(logsnr, cond or Condition()), []        # (B, emb)
        h = self.project_in(dwt(z, self.wavelet_levels))            # (B, widths[0], top, top)
        for pool, blocks in zip(self.pool, self.down):
            h = pool(h)                                     # (B, widths[i], top / 2^i, ...)
            skips.append(h)
            for block, attention in blocks:
                h = attention(block(h, emb))
                skips.append(h)
        for blocks, upsample in zip(self.up, self.upsample):
            for block, attention in blocks:
                h = attention(block(h, emb, skips.pop()))
            h = upsample(h)                                 # (B, widths[i - 1], twice the size)
        h = self.project_out(F.silu(self.norm_out(h)))      # (B, 3 4^levels, top, top)
        return idwt(h.float(), self.wavelet_levels)         # (B, 3, H, W), always in float32
