"""The U-Net that the paper compares its U-ViT with (`--net unet`), made of the U-ViT's parts.

ResBlocks on every level down to 8 x 8 and, with one more a level, back; on maps of side 16 or less
each is followed by attention. Skips, one per block and one per level, are added, as in the U-ViT.
"""
import math
from functools import partial

import torch.nn as nn
import torch.nn.functional as F

from schedule import side, sides
from uvit import (AttentionBlock, Embedding, ResBlock, Upsample, ends, group_norm, rows,
                  wavelet_levels)
from wavelet import dwt, idwt

# The paper's table: multiples of the first width, and ResBlocks, a level each. The rows of 128 and
# 256 see pixels, that of 512 a wavelet of two levels. Smaller pictures start further down the row.
UNETS = {128: ((1, 2, 4, 8, 8), (3, 4, 4, 12, 4)),
         256: ((1, 1, 2, 4, 8, 8), (1, 2, 2, 4, 12, 4)),
         512: ((2, 3, 4, 8, 8), (3, 3, 4, 12, 4))}


class MapAttention(AttentionBlock):
    """Self-attention among the pixels of a map: (B, C, H, W) -> same."""

    def forward(self, x):
        return super().forward(x.flatten(2).mT).mT.reshape(x.shape)


class UNet(nn.Module):
    """U-Net: z (B, 3, H, W), logsnr (B,), label or None -> v_hat, z's shape.

    channels: width of a level is this times its number in UNETS; blocks_16: ResBlocks on the
    way down at 16 x 16, the one dial of its size (12 in the paper); the others: see UViT.
    """

    def __init__(self, res, channels, head, emb, dropout=0.1, classes=0, patch="dwt",
                 dropout_res=16, portrait=False, blocks_16=12):
        super().__init__()
        self.classes, self.text = classes, None
        multiples, blocks = UNETS[128 if side(res) <= 128 else 256 if side(res) <= 256 else 512]
        levels = wavelet_levels(res) if len(blocks) == 5 and patch != "none" else 0
        depth = 2 + max(0, math.ceil(math.log2(side(res) / 2**levels / 16)))
        widths = [channels * m for m in (multiples[:1] * depth + multiples)[-depth:]]
        widths[0] = max(widths[0], min(128, 3 * 4**levels))     # as in the U-ViT
        blocks = (blocks[:1] * depth + blocks)[-depth:-2] + (blocks_16, blocks[-1])
        step = 2 ** (levels + depth - 1)
        assert all(s % step == 0 for s in sides(res)), f"{step} must divide the sides of {res}"

        def stages(more, skip):
            for i, (w, count) in enumerate(zip(widths, blocks)):
                size = side(res) / 2 ** (levels + i)
                drop = dropout if size <= dropout_res else 0.0
                attention = partial(MapAttention, w, head) if size <= 16 else nn.Identity
                yield nn.ModuleList(nn.ModuleList([ResBlock(w, emb, drop, skip), attention()])
                                    for _ in range(count + more))

        self.levels = levels if patch == "dwt" else 0
        self.project_in, self.project_out = ends(patch, levels, widths[0])
        self.embedding = Embedding(emb, classes, portrait)
        self.down = nn.ModuleList(stages(0, False))
        self.up = nn.ModuleList([*stages(1, True)][::-1])
        pairs = list(zip(widths, widths[1:]))
        self.pool = nn.ModuleList([nn.Identity()] + [
            nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(w, below, 1)) for w, below in pairs])
        self.unpool = nn.ModuleList([
            nn.Sequential(nn.Conv2d(below, w, 1), Upsample()) for w, below in pairs[::-1]
        ] + [nn.Identity()])
        self.norm_out = group_norm(widths[0])

    def forward(self, z, logsnr, label=None):
        emb, skips = self.embedding(logsnr, rows(label, z, self.classes, 0)), []    # (B, emb)
        h = self.project_in(dwt(z, self.levels))            # (B, widths[0], top, top)
        for pool, blocks in zip(self.pool, self.down):
            h = pool(h)                                     # (B, widths[i], top / 2^i, ...)
            skips.append(h)
            for block, attention in blocks:
                h = attention(block(h, emb))                # (B, widths[i], top / 2^i, ...)
                skips.append(h)
        for blocks, unpool in zip(self.up, self.unpool):
            for block, attention in blocks:
                h = attention(block(h, emb, skips.pop()))   # (B, widths[i], top / 2^i, ...)
            h = unpool(h)                                   # (B, widths[i - 1], twice that, ...)
        h = self.project_out(F.silu(self.norm_out(h)))      # (B, 3 4^levels, top, top)
        return idwt(h.float(), self.levels)                 # (B, 3, H, W), inverted in float32
