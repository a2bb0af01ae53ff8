"""The U-ViT (Sections 3.3 to 3.5, Figure 8, Appendix B) and the table of presets.

A small convolutional U-Net around a large transformer at 16 x 16: large maps cost memory, even with
few weights. By Table 1 (a 3 x 3 convolution, batch 1024) 128 channels at 256 x 256 have 16 GB of
features and 2.8 MB of kernel, 1024 channels at 16 x 16 have 0.5 GB and 180 MB. The first layer
keeps maps at 128 x 128 or less.

    z -> wavelet -> ResBlocks at 128 -- a skip per ResBlock --> ResBlocks at 128 -> inverse -> v_hat
                      pool |                                           ^ upsample
                    ResBlocks at 64, 32 ----------------------> ResBlocks at 32, 64
                      pool |                                           ^ upsample
                           +---- MLP and attention blocks at 16 x 16 --+

logsnr and the condition become one vector, emb. ResBlocks and MLP blocks read it by FiLM: their
hidden values become h (1 + scale) + shift, scale and shift being a linear layer of emb.
"""
import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import dot_product_attention
from schedule import height_width, mean_side
from wavelet import dwt, idwt

PRESETS = {     # widths at 128, 64, 32, 16; blocks: ResBlocks at 128, 64, 32; depth: of the
    # transformer, at 16 x 16. `laptop` has one halving more: its transformer is at 8 x 8.
    "laptop": dict(network=dict(widths=(16, 16, 32, 64, 128), blocks=(1, 1, 1, 1), depth=6,
                                head_dim=64, emb_dim=256, dropout=0.0, position_init="sines"),
                   training=dict(batch=16, steps=3_800, lr=2e-3, warmup=100, optimizer="muon",
                                 decay=.4)),    # lr falls to 0 over the last 40% of the steps
    "tiny": dict(network=dict(widths=(16, 16, 48, 128), blocks=(1, 1, 1), depth=4, head_dim=64,
                              emb_dim=256, dropout=0.0, position_init="sines"),
                 training=dict(batch=32, steps=1_500, lr=2e-3, warmup=100)),
    "mini": dict(network=dict(widths=(32, 64, 96, 192), blocks=(1, 1, 2), depth=8, head_dim=64,
                              emb_dim=192, dropout=0.0, position_init="sines"),
                 training=dict(batch=128, steps=10_000, lr=8e-4, warmup=200)),
    "small": dict(network=dict(widths=(64, 96, 192, 512), blocks=(2, 2, 2), depth=8, head_dim=64,
                               emb_dim=512, dropout=0.1, position_init="gauss"),
                  training=dict(batch=64, steps=50_000, lr=4e-4, warmup=1_000)),
    "base": dict(network=dict(widths=(128, 192, 384, 1024), blocks=(2, 2, 2), depth=16, head_dim=64,
                              emb_dim=1024, dropout=0.1, position_init="gauss"),
                 training=dict(batch=256, steps=300_000, lr=2e-4, warmup=5_000)),
    # The paper's, but for 16 heads in place of 4: flash attention has no heads 512 wide.
    "paper": dict(network=dict(widths=(128, 256, 512, 2048), blocks=(2, 2, 2), depth=36,
                               head_dim=128, emb_dim=1024, dropout=0.2, position_init="gauss"),
                  training=dict(batch=2048, steps=500_000, lr=1e-4, warmup=10_000)),
}


class Condition(NamedTuple):
    """What the network is told besides z_t and logsnr. None: no class, no portrait, no caption."""
    label: torch.Tensor | None = None       # (B,) class from 0; -1: no class
    portrait: torch.Tensor | None = None    # (B,) 1: a portrait, rotated to landscape; 0: not
    tokens: torch.Tensor | None = None      # (B, L) caption, padded with 0; all 0: no caption

    def dropped(self, drop):
        """Without class and caption where drop (B,) is true, as guidance needs it (Appendix A)."""
        label = None if self.label is None else torch.where(drop, -1, self.label)
        tokens = None if self.tokens is None else torch.where(drop[:, None], 0, self.tokens)
        return Condition(label, self.portrait, tokens)  # no guidance towards an orientation


def patch_levels(res, largest=128):
    """How often the first layer halves the picture: to 128 x 128 at most (Section 3.3)."""
    return max(0, math.ceil(math.log2(mean_side(res) / largest)))


def halvings_to(smallest, res, largest=128):
    """How often the U-Net halves its largest map, to a side of at most `smallest`."""
    return max(0, math.ceil(math.log2(mean_side(res) / 2**patch_levels(res, largest) / smallest)))


def zero(layer):
    """Zero weights and bias: at the start each block is the identity, and v_hat = 0."""
    for part in layer.parameters():
        nn.init.zeros_(part)
    return layer


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels)


class ResBlock(nn.Module):
    """Residual block with FiLM and an added, normalised skip: (B, C, H, W) -> same."""

    def __init__(self, channels, emb_dim, dropout, has_skip):
        super().__init__()
        self.norm_in = group_norm(channels)
        self.norm_skip = group_norm(channels) if has_skip else None
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_film, self.film = group_norm(channels), nn.Linear(emb_dim, 2 * channels)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = zero(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x, emb, skip=None):
        h = self.norm_in(x)
        if skip is not None:
            h = (h + self.norm_skip(skip)) / math.sqrt(2)       # added, not concatenated
        h = self.conv_in(F.silu(h))
        scale, shift = self.film(emb)[:, :, None, None].chunk(2, 1)
        h = self.norm_film(h) * (1 + scale) + shift
        return x + self.conv_out(self.dropout(F.silu(h)))


class MLPBlock(nn.Module):
    """MLP of each token with FiLM on its hidden units: (B, N, C) -> same."""

    def __init__(self, width, emb_dim, dropout):
        super().__init__()
        self.norm, self.linear_in = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.film = nn.Linear(emb_dim, 8 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = zero(nn.Linear(4 * width, width))

    def forward(self, x, emb):
        h = F.silu(self.linear_in(self.norm(x)))
        scale, shift = self.film(emb)[:, None].chunk(2, -1)
        return x + self.linear_out(self.dropout(h * (1 + scale) + shift))


class AttentionBlock(nn.Module):
    """Self-attention with normalised q and k, without time conditioning: (B, N, C) -> same."""

    def __init__(self, width, head_dim):
        super().__init__()
        self.head_dim = head_dim
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(head_dim), nn.RMSNorm(head_dim)
        self.linear_out = zero(nn.Linear(width, width))

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, N, 3, C // self.head_dim, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # (B, heads, N, head_dim) each
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)   # in float32
        h = dot_product_attention(q, k, v)
        return x + self.linear_out(h.transpose(1, 2).reshape(B, N, C))


class Embedding(nn.Module):
    """emb: sinusoids of logsnr through two layers, plus embeddings of class, portrait, caption."""

    def __init__(self, emb_dim, classes, portrait=False, text_width=0):
        super().__init__()
        self.emb_dim, self.classes = emb_dim, classes
        self.linear_in, self.linear_out = nn.Linear(emb_dim, emb_dim), nn.Linear(emb_dim, emb_dim)
        self.label = nn.Embedding(classes + 1, emb_dim) if classes else None  # last row: no class
        self.portrait = nn.Embedding(2, emb_dim) if portrait else None
        self.text = nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, emb_dim)) \
            if text_width else None

    def forward(self, logsnr, cond=Condition(), encoded=None):
        """encoded: captions (B, 1 + L, text_width), mask (B, 1 + L): 1 where it counts."""
        # logsnr spans about 30: periods from 1 to 100. (MPS has no logspace.)
        periods = 10 ** torch.linspace(0, 2, self.emb_dim // 2, device=logsnr.device)
        angle = 2 * math.pi * logsnr[:, None] / periods
        h = self.linear_out(F.silu(self.linear_in(torch.cat([angle.sin(), angle.cos()], 1))))
        if self.label is not None:
            label = torch.full_like(logsnr, -1).long() if cond.label is None else cond.label
            h = h + self.label(torch.where(label < 0, self.classes, label))
        if self.portrait is not None:
            rotated = torch.zeros_like(logsnr).long() if cond.portrait is None else cond.portrait
            h = h + self.portrait(rotated)
        if self.text is not None:
            caption, mask = encoded
            h = h + self.text((caption * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return F.silu(h)


class Upsample(nn.Module):
    """Nearest neighbour, (B, C, H, W) -> (B, C, 2H, 2W)."""

    def forward(self, h):
        if torch.compiler.is_compiling():       # interpolate compiles slowly and, at times, wrongly
            return h.repeat_interleave(2, -1).repeat_interleave(2, -2)
        return F.interpolate(h, scale_factor=2)         # keeps channels_last, for speed on CPUs


def input_output_layers(patch, levels, width):
    """First and last layer: 3 x 3 on the bands of a wavelet or on pixels, or strided on pixels."""
    if patch == "conv" and levels:
        stride = 2**levels
        return (nn.Conv2d(3, width, stride, stride),
                zero(nn.ConvTranspose2d(width, 3, stride, stride)))
    channels = 3 * 4**levels
    return nn.Conv2d(channels, width, 3, padding=1), zero(nn.Conv2d(width, channels, 3, padding=1))


def sine_positions(width, H, W):
    """(1, width, H, W): sines and cosines of y, then of x, periods from 2 tokens to 2 max(H, W)."""
    periods = 2 * max(H, W) ** torch.linspace(0, 1, width // 4)

    def waves(n):                                               # (width / 2, n)
        angle = 2 * math.pi / periods[:, None] * torch.arange(n)
        return torch.cat([angle.sin(), angle.cos()])

    y, x = waves(H)[:, :, None].expand(-1, H, W), waves(W)[:, None].expand(-1, H, W)
    return torch.cat([y, x])[None]


def stages(widths, blocks, halvings):
    """Widths and blocks from the largest map down. Maps above 128, if any, have those of 128."""
    above = max(0, halvings - len(blocks))  # blocks: one entry per halving from 128 on
    widths, blocks = widths[:1] * above + widths, blocks[:1] * above + blocks
    unused = len(blocks) - halvings         # stages too large for the picture: 1 at 64 x 64
    return list(widths[unused:]), blocks[unused:]


class UViT(nn.Module):
    """U-ViT (Figure 8): z (B, 3, H, W), logsnr (B,), a Condition or None -> v_hat, shaped as z.

    res: 512 or "384x640"; its sides must be multiples of 2^(levels + halvings), see below;
    widths, blocks, depth, head_dim, emb_dim, dropout, position_init: see PRESETS.
    widths[0] is raised, if lower, to min(128, 6 4^levels), twice the wavelet's channels;
    patch: "dwt", "conv" (strided and transposed convolution) or "none" (full-size maps);
    largest_map: greatest side of a map;  dropout_res: greatest side with dropout in ResBlocks;
    classes: 0 for none;  portrait: whether it is told Condition.portrait;
    text: None, or an encoder of captions, which brings its cross-attention block (text.py).
    """

    skip_per_block = True           # the variant in sid2.py has one per stage instead

    def __init__(self, res, widths, blocks, depth, head_dim, emb_dim, dropout=0.0,
                 position_init="gauss", patch="dwt", largest_map=128, dropout_res=16, classes=0,
                 portrait=False, text=None):
        super().__init__()
        assert patch in ("dwt", "conv", "none"), f"patch must be dwt, conv or none, not {patch!r}"
        self.text = text
        text_width = text.width if text else 0
        smallest = 128 >> len(blocks)       # the smallest map is at most this: 16 (laptop: 8)
        halvings = halvings_to(smallest, res, largest_map)      # by pooling
        levels = patch_levels(res, largest_map)                 # by the first layer
        if patch == "none":
            halvings, levels = halvings + levels, 0
        self.wavelet_levels = levels if patch == "dwt" else 0
        H, W = height_width(res)
        step = 2 ** (levels + halvings)
        assert H % step == W % step == 0, f"{step} must divide the sides of {res}"
        widths, blocks = stages(widths, blocks, halvings)
        widths[0] = max(widths[0], min(128, 6 * 4**levels))
        self.project_in, self.project_out = input_output_layers(patch, levels, widths[0])
        self.embedding = Embedding(emb_dim, classes, portrait, text_width)
        self.down, self.pool, self.up, self.upsample = (nn.ModuleList() for _ in range(4))
        for i, (C, below) in enumerate(zip(widths, widths[1:])):
            side = mean_side(res) / 2 ** (levels + i)
            drop = dropout if side <= dropout_res else 0.0
            down = [ResBlock(C, emb_dim, drop, has_skip=False) for _ in range(blocks[i])]
            up = [ResBlock(C, emb_dim, drop, self.skip_per_block) for _ in range(blocks[i])]
            self.down.append(nn.ModuleList(down))
            self.pool.append(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(C, below, 1)))
            self.upsample.insert(0, nn.Sequential(nn.Conv2d(below, C, 1), Upsample()))
            self.up.insert(0, nn.ModuleList(up))
        C, H, W = widths[-1], H // step, W // step
        assert position_init in ("gauss", "sines"), f"no position_init {position_init!r}"
        # The paper's are Gaussian. From sines a short run learns the layout of pictures sooner.
        self.position = nn.Parameter(0.01 * torch.randn(1, C, H, W) if position_init == "gauss"
                                     else sine_positions(C, H, W) / 2)
        self.transformer = nn.ModuleList(nn.ModuleList([            # a ModuleList may hold None
            MLPBlock(C, emb_dim, dropout), AttentionBlock(C, head_dim),
            text.cross_attention(C, head_dim, text_width) if text else None])
            for _ in range(depth))
        self.norm_out = group_norm(widths[0])

    def forward(self, z, logsnr, cond=None):
        cond = cond or Condition()
        encoded = self.text(cond.tokens, len(z)) if self.text else None     # caption, its mask
        emb = self.embedding(logsnr, cond, encoded)             # (B, emb_dim)
        h = self.project_in(dwt(z, self.wavelet_levels))        # (B, widths[0], 128, 128) from 512
        h, skips = self.go_down(h, emb)                         # (B, widths[-1], 16, 16)
        h = self.transform(h + self.position, emb, encoded)     # (B, widths[-1], 16, 16)
        h = self.go_up(h, emb, skips)                           # (B, widths[0], 128, 128)
        h = self.project_out(F.silu(self.norm_out(h)))          # (B, 3 4^levels, 128, 128)
        return idwt(h.float(), self.wavelet_levels)             # (B, 3, H, W), always in float32

    def go_down(self, h, emb):
        skips = []
        for blocks, pool in zip(self.down, self.pool):
            for block in blocks:
                h = block(h, emb)                               # (B, widths[i], 128 / 2^i, ...)
                skips.append(h)
            h = pool(h)                                         # (B, widths[i + 1], half of it)
        return h, skips

    def transform(self, h, emb, encoded):
        shape, h = h.shape, h.flatten(2).mT                     # (B, 256, widths[-1])
        for mlp, attention, cross_attention in self.transformer:
            h = attention(mlp(h, emb))
            if cross_attention is not None:
                h = cross_attention(h, *encoded)
        return h.mT.reshape(shape)                              # (B, widths[-1], 16, 16)

    def go_up(self, h, emb, skips):
        for upsample, blocks in zip(self.upsample, self.up):
            h = upsample(h)                                     # (B, widths[i], twice the size)
            for block in blocks:
                h = block(h, emb, skips.pop())                  # last in, first out
        return h
