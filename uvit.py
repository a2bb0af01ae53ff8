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

from schedule import side, sides
from wavelet import dwt, idwt

# Widths and ResBlocks are those of the levels 128, 64, 32 and the transformer's 16 x 16; a smaller
# picture starts further down the row. The top level is as wide as there are bands, up to the
# paper's 128: noise of bands that it has no room for would stay in the picture. `head` is the width
# of one head, `start` what positions are before they are learned (README, "Our choices").
PRESETS = {
    name: dict(widths=widths, blocks=blocks, depth=depth, head=head, emb=emb, dropout=dropout,
               start=start)
    for name,     widths,                blocks,    depth, head,  emb, dropout, start in (
        ("tiny",  (16, 16, 48, 128),     (1, 1, 1),     4,   64,  256,     0.0, "waves"),
        ("mini",  (32, 64, 96, 192),     (1, 1, 2),     8,   64,  192,     0.0, "waves"),
        ("small", (64, 96, 192, 512),    (2, 2, 2),     8,   64,  512,     0.1, "noise"),
        ("base",  (128, 192, 384, 1024), (2, 2, 2),    16,   64, 1024,     0.1, "noise"),
        ("paper", (128, 256, 512, 2048), (2, 2, 2),    36,  128, 1024,     0.2, "noise"))}


def wavelet_levels(res):
    """Levels of wavelet (log2 of the stride) that bring side(res) to 128 or less (Section 3.3)."""
    return max(0, math.ceil(math.log2(side(res) / 128)))


def unet_levels(res):
    """Halvings from the top level of the network to its transformer, at 16 x 16 or just below."""
    return max(0, math.ceil(math.log2(side(res) / 2**wavelet_levels(res) / 16)))


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


class CrossAttentionBlock(nn.Module):
    """Attention to a caption (Section 3.6): x (B, N, C), text.py's text, seen -> as x."""

    def __init__(self, width, head, text):
        super().__init__()
        self.head, self.norm, self.norm_text = head, nn.LayerNorm(width), nn.LayerNorm(text)
        self.q, self.kv = nn.Linear(width, width), nn.Linear(text, 2 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(head), nn.RMSNorm(head)
        self.linear_out = zero(nn.Linear(width, width))

    def forward(self, x, text, seen):
        B, N, C = x.shape
        q = self.q(self.norm(x)).view(B, N, -1, self.head).transpose(1, 2)
        k, v = self.kv(self.norm_text(text)).view(B, -1, 2, C // self.head, self.head) \
            .permute(2, 0, 3, 1, 4)                             # (B, heads, L, head) each
        q, k = self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype)
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None])
        return x + self.linear_out(h.transpose(1, 2).reshape(B, N, C))


class Embedding(nn.Module):
    """The clock, the class, the way up, what the caption says on the whole: logsnr (B,), label
    (B, 2 + L) and, with a caption, text (B, 1 + L, T), seen (B, 1 + L) -> (B, emb).
    """

    def __init__(self, emb, classes, portrait=False, text=0):
        super().__init__()
        self.emb, self.classes = emb, classes
        self.linear_in, self.linear_out = nn.Linear(2 * (emb // 2), emb), nn.Linear(emb, emb)
        self.label = nn.Embedding(classes + 1, emb) if classes else None    # the last row: no class
        self.portrait = nn.Embedding(2, emb) if portrait else None
        self.text = nn.Sequential(nn.LayerNorm(text), nn.Linear(text, emb)) if text else None

    def forward(self, logsnr, label, text=None, seen=None):
        # Sinusoids over logsnr, which spans 30, of periods from 1 to 100 (MPS has no logspace).
        periods = 10 ** torch.linspace(0, 2, self.emb // 2, device=logsnr.device)
        angle = 2 * math.pi * logsnr[:, None] / periods
        h = self.linear_out(F.silu(self.linear_in(torch.cat([angle.sin(), angle.cos()], 1))))
        if self.label is not None:
            h = h + self.label(label[:, 0])
        if self.portrait is not None:
            h = h + self.portrait(label[:, 1])
        if self.text is not None:
            h = h + self.text((text * seen[..., None]).sum(1) / seen.sum(1, keepdim=True))
        return F.silu(h)


def ends(patch, levels, top):
    """First and last layer: on a wavelet's bands or pixels, or the two strided convolutions."""
    if patch == "conv" and levels:
        return (nn.Conv2d(3, top, 2**levels, stride=2**levels),
                zero(nn.ConvTranspose2d(top, 3, 2**levels, stride=2**levels)))
    channels = 3 * 4**levels
    return nn.Conv2d(channels, top, 3, padding=1), zero(nn.Conv2d(top, channels, 3, padding=1))


def waves(width, H, W):
    """Positions to start from, (1, width, H, W): sines and cosines over y, then over x, of periods
    from 2 tokens to twice the longer side.
    """
    turn = math.pi * torch.logspace(0, -math.log2(max(H, W)), width // 4, base=2)   # per token
    y, x = (turn[:, None] * torch.arange(count) for count in (H, W))
    y, x = (torch.cat([angle.sin(), angle.cos()]) for angle in (y, x))
    return torch.cat([y[:, :, None].expand(-1, H, W), x[:, None].expand(-1, H, W)])[None]


def rows(label, z, classes, length):
    """label as a network may be given it: None, (B,), (B, 2) or (B, 2 + length) -> the last."""
    if label is None:
        label = torch.full((len(z),), classes, device=z.device)
    label = label.view(len(z), -1)
    given, wanted = label.shape[1], 2 + length
    assert given in (1, 2, wanted), f"a label is 1, 2 or {wanted} numbers here, not {given}"
    return F.pad(label, (0, wanted - given))


class UViT(nn.Module):
    """U-ViT (Figure 8): z (B, 3, H, W), logsnr (B,), label or None -> v_hat, z's shape.

    res: size of the pictures, d or "HxW", multiples of 2^(levels of wavelet + halvings);
    widths, blocks, depth, head, emb, dropout: a row of PRESETS; classes: 0 for an unconditional
    model, else a class is in [0, classes], `classes` itself being the null class;
    patch: "dwt", "conv" (strided and transposed convolution) or "none" (full-size top level);
    dropout_res: dropout acts in the transformer, and in ResBlocks on maps of at most this side;
    portrait: told which pictures stand upright;  text: None or an encoder of text.py;
    start: of the learned positions, "noise" of deviation 0.01 (Appendix B) or "waves";
    residual: one skip a level, of SiD2 (not in the first paper), in place of one a block.
    label: (B,) classes, or (B, 2 + L): class, upright (0 or 1), the L tokens of a caption.
    """

    def __init__(self, res, widths, blocks, depth, head, emb, dropout=0.0, classes=0, patch="dwt",
                 dropout_res=16, portrait=False, text=None, residual=False, start="noise"):
        super().__init__()
        self.classes, self.text, self.residual = classes, text, residual
        levels, halvings = wavelet_levels(res), unet_levels(res)
        if patch == "none":
            levels, halvings = 0, levels + halvings
        step = 2 ** (levels + halvings)
        height, width = sides(res)
        assert height % step == width % step == 0, f"{step} must divide the sides of {res}"
        assert patch in ("dwt", "conv", "none"), f"patch must be dwt, conv or none, not {patch!r}"
        assert start in ("noise", "waves"), f"start must be noise or waves, not {start!r}"
        self.levels = levels if patch == "dwt" else 0
        # The last `halvings` levels above 16 x 16; levels above the table's first repeat its width.
        extra = max(0, halvings + 1 - len(widths))
        widths = ((widths[0],) * extra + tuple(widths))[-halvings - 1:]
        blocks = ((blocks[0],) * extra + tuple(blocks))[-halvings:] if halvings else ()
        widths = (max(widths[0], min(128, 3 * 4**levels)), *widths[1:])     # room for all bands
        maps = [side(res) / 2 ** (levels + i) for i in range(halvings)]
        drops = [dropout if size <= dropout_res else 0.0 for size in maps]

        self.project_in, self.project_out = ends(patch, levels, widths[0])
        self.embedding = Embedding(emb, classes, portrait, text.width if text else 0)
        self.down, self.pool, self.up, self.unpool = (nn.ModuleList() for _ in range(4))
        for w, below, n, drop in zip(widths, widths[1:], blocks, drops):
            down, up = ([ResBlock(w, emb, drop, skip) for _ in range(n)]
                        for skip in (False, not residual))
            self.down.append(nn.ModuleList(down))
            self.pool.append(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(w, below, 1)))
            self.unpool.insert(0, nn.Sequential(nn.Conv2d(below, w, 1), Upsample()))
            self.up.insert(0, nn.ModuleList(up))
        w = widths[-1]
        grid = w, height // step, width // step
        self.position = nn.Parameter(
            waves(*grid) / 2 if start == "waves" else 0.01 * torch.randn(1, *grid))
        self.transformer = nn.ModuleList(
            nn.ModuleList([MLPBlock(w, emb, dropout), AttentionBlock(w, head)]
                          + ([CrossAttentionBlock(w, head, text.width)] if text else []))
            for _ in range(depth))
        self.norm_out = group_norm(widths[0])

    def forward(self, z, logsnr, label=None):
        label = rows(label, z, self.classes, self.text.length if self.text else 0)
        caption = self.text(label[:, 2:]) if self.text else ()          # (B, 1 + L, T), ...
        emb, skips, pooled = self.embedding(logsnr, label, *caption), [], []        # (B, emb)
        h = self.project_in(dwt(z, self.levels))            # (B, widths[0], top, top)
        for blocks, pool in zip(self.down, self.pool):
            for block in blocks:
                h = block(h, emb)                           # (B, widths[i], top / 2^i, ...)
                skips.append(h)
            pooled.append((h, pool(h)))
            _, h = pooled[-1]                               # (B, widths[i + 1], half of it, ...)
        h = h + self.position                               # (B, widths[-1], 16, 16)
        shape, h = h.shape, h.flatten(2).mT                 # (B, 256, widths[-1])
        for mlp, attention, *cross in self.transformer:
            h = attention(mlp(h, emb))                      # (B, 256, widths[-1])
            for block in cross:
                h = block(h, *caption)                      # (B, 256, widths[-1])
        h = h.mT.reshape(shape)                             # (B, widths[-1], 16, 16)
        for unpool, blocks in zip(self.unpool, self.up):
            before, after = pooled.pop()
            h = unpool(h - after) + before if self.residual else unpool(h)
            for block in blocks:
                h = block(h, emb, None if self.residual else skips.pop())   # (B, widths[i], ...)
        h = self.project_out(F.silu(self.norm_out(h)))      # (B, 3 4^levels, top, top)
        return idwt(h.float(), self.levels)                 # (B, 3, H, W), inverted in float32


def residual_blocks(model):
    """All residual blocks, which hold most of the weights and of the activations."""
    kinds = (ResBlock, MLPBlock, AttentionBlock, CrossAttentionBlock)
    return [part for part in model.modules() if isinstance(part, kinds)]
