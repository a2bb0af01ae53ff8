"""The U-ViT (Sections 3.3 to 3.5, Figure 8, Appendix B).

A small convolutional U-Net around a large transformer at 16 x 16. Scaling is cheap down there: at
256 x 256 a convolution holds gigabytes of features for megabytes of weights, at 16 x 16 the two
balance (Table 1). The wavelet (or a strided convolution) keeps the top level at 128 x 128 or less.

    z (B, 3, H, W) -> patch -> ResBlocks, pool, ResBlocks, pool, ... -> transformer at 16 x 16
                                    |  skips, one per block  |
      v_hat <- unpatch <- ResBlocks, up, ResBlocks, up, ...  <-
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from wavelet import dwt, idwt

# Widths and ResBlocks are those of the levels 128, 64, 32 and the transformer's 16 x 16; a smaller
# picture starts further down the row. `head` is the width of one head (README, "Our choices").
PRESETS = {
    name: dict(widths=widths, blocks=blocks, depth=depth, head=head, emb=emb, dropout=dropout)
    for name,     widths,                blocks,    depth, head,  emb, dropout in (
        ("tiny",  (16, 16, 48, 128),     (1, 1, 1),     4,   64,  256,     0.0),
        ("small", (64, 96, 192, 512),    (2, 2, 2),     8,   64,  512,     0.1),
        ("base",  (128, 192, 384, 1024), (2, 2, 2),    16,   64, 1024,     0.1),
        ("paper", (128, 256, 512, 2048), (2, 2, 2),    36,  128, 1024,     0.2))}


def wavelet_levels(res):
    """Levels of wavelet (log2 of the stride) that bring side res to 128 or less (Section 3.3)."""
    return max(0, math.ceil(math.log2(res / 128)))


def unet_levels(res):
    """Halvings from the top level of the network to its transformer, at 16 x 16 or just below."""
    return max(0, math.ceil(math.log2(res / 2**wavelet_levels(res) / 16)))


def zero(layer):
    """Weights and bias at zero: every block starts as the identity, the network as v_hat = 0."""
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    return layer


def group_norm(channels):
    return nn.GroupNorm(min(32, channels // 4), channels)


class ResBlock(nn.Module):
    """Residual block with FiLM and an added, normalised skip (Appendix B): (B, C, H, W) -> same."""

    def __init__(self, channels, emb, dropout, skip):
        super().__init__()
        self.norm_in, self.norm_skip = group_norm(channels), group_norm(channels) if skip else None
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_film, self.film = group_norm(channels), nn.Linear(emb, 2 * channels)
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


class Upsample(nn.Module):
    """Each value becomes a square: (B, C, H, W) -> (B, C, 2H, 2W).

    nn.Upsample's gradient is a scatter, which compiles slowly and on a CPU at times wrongly.
    """

    def forward(self, h):
        B, C, H, W = h.shape
        return h[..., None, :, None].expand(B, C, H, 2, W, 2).reshape(B, C, 2 * H, 2 * W)


class MLPBlock(nn.Module):
    """Per-token MLP with FiLM on its hidden units (Appendix B): (B, N, C) -> same."""

    def __init__(self, width, emb, dropout):
        super().__init__()
        self.norm, self.linear_in = nn.LayerNorm(width), nn.Linear(width, 4 * width)
        self.film = nn.Linear(emb, 8 * width)
        self.dropout = nn.Dropout(dropout)
        self.linear_out = zero(nn.Linear(4 * width, width))

    def forward(self, x, emb):
        h = F.silu(self.linear_in(self.norm(x)))
        scale, shift = self.film(emb)[:, None].chunk(2, -1)
        return x + self.linear_out(self.dropout(h * (1 + scale) + shift))


class AttentionBlock(nn.Module):
    """Self-attention with normalised q and k, no clock (Appendix B): (B, N, C) -> same."""

    def __init__(self, width, head):
        super().__init__()
        self.head, self.norm, self.qkv = head, nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(head), nn.RMSNorm(head)
        self.linear_out = zero(nn.Linear(width, width))

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(self.norm(x)).view(B, N, 3, C // self.head, self.head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                    # (B, heads, N, head) each
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.linear_out(h.transpose(1, 2).reshape(B, N, C))


class Embedding(nn.Module):
    """The clock and the class: logsnr (B,), label (B,) or None -> (B, emb)."""

    def __init__(self, emb, classes):
        super().__init__()
        self.emb, self.classes = emb, classes
        self.linear_in, self.linear_out = nn.Linear(2 * (emb // 2), emb), nn.Linear(emb, emb)
        self.label = nn.Embedding(classes + 1, emb) if classes else None    # the last row: no class

    def forward(self, logsnr, label):
        # Sinusoids over logsnr with periods from 1 to 100: the schedule spans 30.
        periods = torch.logspace(0, 2, self.emb // 2, device=logsnr.device)
        angle = 2 * math.pi * logsnr[:, None] / periods
        h = self.linear_out(F.silu(self.linear_in(torch.cat([angle.sin(), angle.cos()], 1))))
        if self.label is not None:
            if label is None:
                label = torch.full_like(logsnr, self.classes, dtype=torch.long)
            h = h + self.label(label)
        return F.silu(h)


class UViT(nn.Module):
    """U-ViT (Figure 8): z (B, 3, res, res), logsnr (B,), label (B,) or None -> v_hat, z's shape.

    res: side of the pictures, a multiple of 2^(levels of wavelet + halvings);
    widths, blocks, depth, head, emb, dropout: a row of PRESETS; classes: 0 for an unconditional
    model, else label is in [0, classes], `classes` itself being the null class (also label=None);
    patch: "dwt", "conv" (strided and transposed convolution) or "none" (full-size top level);
    dropout_res: dropout acts in the transformer, and in ResBlocks on maps of at most this side.
    """

    def __init__(self, res, widths, blocks, depth, head, emb, dropout=0.0, classes=0, patch="dwt",
                 dropout_res=16):
        super().__init__()
        self.classes = classes
        levels, halvings = wavelet_levels(res), unet_levels(res)
        if patch == "none":
            levels, halvings = 0, levels + halvings
        step = 2 ** (levels + halvings)
        assert res % step == 0, f"res must be a multiple of {step}, not {res}"
        assert patch in ("dwt", "conv", "none"), f"patch must be dwt, conv or none, not {patch!r}"
        self.levels, channels = (levels, 3 * 4**levels) if patch == "dwt" else (0, 3)
        # The last `halvings` levels above 16 x 16; levels above the table's first repeat its width.
        extra = max(0, halvings + 1 - len(widths))
        widths = ((widths[0],) * extra + tuple(widths))[-halvings - 1:]
        blocks = ((blocks[0],) * extra + tuple(blocks))[-halvings:] if halvings else ()
        sizes = [res // 2**levels // 2**i for i in range(halvings + 1)]
        drops = [dropout if size <= dropout_res else 0.0 for size in sizes[:-1]] + [dropout]

        top, width = widths[0], widths[-1]
        if patch == "conv" and levels:
            self.project_in = nn.Conv2d(channels, top, 2**levels, stride=2**levels)
            self.project_out = zero(nn.ConvTranspose2d(top, channels, 2**levels, stride=2**levels))
        else:
            self.project_in = nn.Conv2d(channels, top, 3, padding=1)
            self.project_out = zero(nn.Conv2d(top, channels, 3, padding=1))
        self.embedding = Embedding(emb, classes)
        self.down, self.pool, self.up, self.unpool = (nn.ModuleList() for _ in range(4))
        for w, below, n, drop in zip(widths, widths[1:], blocks, drops):
            down, up = ([ResBlock(w, emb, drop, skip) for _ in range(n)] for skip in (False, True))
            self.down.append(nn.ModuleList(down))
            self.pool.append(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(w, below, 1)))
            unpool = nn.Sequential(nn.Conv2d(below, w, 1), Upsample())
            self.unpool.insert(0, unpool)
            self.up.insert(0, nn.ModuleList(up))
        self.position = nn.Parameter(0.01 * torch.randn(1, width, sizes[-1], sizes[-1]))
        self.transformer = nn.ModuleList(
            nn.ModuleList([MLPBlock(width, emb, dropout), AttentionBlock(width, head)])
            for _ in range(depth))
        self.norm_out = group_norm(top)

    @classmethod
    def from_config(cls, config, classes):
        """The U-ViT that a configuration (a dict) names; config["dropout"] < 0: its preset's."""
        shape = dict(PRESETS[config["model"]])
        if config["dropout"] >= 0:
            shape["dropout"] = config["dropout"]
        return cls(config["res"], **shape, classes=classes, patch=config["patch"],
                   dropout_res=config["dropout_res"])

    def blocks(self):
        """All residual blocks, which hold most of the weights and of the activations."""
        kinds = (ResBlock, MLPBlock, AttentionBlock)
        return [part for part in self.modules() if isinstance(part, kinds)]

    def forward(self, z, logsnr, label=None):
        emb, skips = self.embedding(logsnr, label), []      # (B, emb)
        h = self.project_in(dwt(z, self.levels))            # (B, widths[0], top, top)
        for blocks, pool in zip(self.down, self.pool):
            for block in blocks:
                h = block(h, emb)                           # (B, widths[i], top / 2^i, ...)
                skips.append(h)
            h = pool(h)                                     # (B, widths[i + 1], half of it, ...)
        h = h + self.position                               # (B, widths[-1], 16, 16)
        shape, h = h.shape, h.flatten(2).mT                 # (B, 256, widths[-1])
        for mlp, attention in self.transformer:
            h = attention(mlp(h, emb))                      # (B, 256, widths[-1])
        h = h.mT.reshape(shape)                             # (B, widths[-1], 16, 16)
        for unpool, blocks in zip(self.unpool, self.up):
            h = unpool(h)                                   # (B, widths[i], top / 2^i, ...)
            for block in blocks:
                h = block(h, emb, skips.pop())              # (B, widths[i], top / 2^i, ...)
        h = self.project_out(F.silu(self.norm_out(h)))      # (B, 3 4^levels, top, top)
        return idwt(h.float(), self.levels)                 # (B, 3, H, W), inverted in float32
