"""unet.py: the U-Net that the paper compares with."""

import pytest
import torch

import sample as sampling
import train
import unet
import uvit
from test_all import random_weights, small_unet


UNET_ROWS = {   # res: resolutions and widths, ResBlocks on the way down, of the paper's table
    128: ([128, 64, 32, 16, 8], [128, 256, 512, 1024, 1024], [3, 4, 4, 12, 4], 3),
    256: ([256, 128, 64, 32, 16, 8], [128, 128, 256, 512, 1024, 1024], [1, 2, 2, 4, 12, 4], 3),
    512: ([128, 64, 32, 16, 8], [256, 384, 512, 1024, 1024], [3, 3, 4, 12, 4], 48)}


def unet_by_hand(res, emb=1024):
    """Weights, and multiplications and additions of one forward (2 each), of a row of the paper's table."""
    sizes, widths, blocks, channels = UNET_ROWS[res]
    conv = lambda a, b, k: (a * b * k * k + b, 2 * a * b * k * k)               # weights, FLOPs per pixel
    weights = conv(channels, widths[0], 3)[0] + conv(widths[0], channels, 3)[0] + 2 * widths[0] + 2 * (emb * emb + emb)
    flops = (conv(channels, widths[0], 3)[1] + conv(widths[0], channels, 3)[1]) * sizes[0] ** 2 + 2 * 2 * emb * emb
    for size, w, n in zip(sizes, widths, blocks):
        block = 2 * conv(w, w, 3)[0] + (emb * 2 * w + 2 * w) + 2 * 2 * w
        work = 2 * conv(w, w, 3)[1] * size**2 + 2 * emb * 2 * w
        if size <= 16:                                                          # norm, q k v, q and k per head, output
            block += 2 * w + 4 * (w * w + w) + 2 * 64
            work += 2 * 4 * w * w * size**2 + 2 * 2 * size**4 * w
        weights += (2 * n + 1) * block + (n + 1) * 2 * w                        # n down, n + 1 up, which norm a skip each
        flops += (2 * n + 1) * work
    for size, w, below in zip(sizes, widths, widths[1:]):
        weights += conv(w, below, 1)[0] + conv(below, w, 1)[0]
        flops += (conv(w, below, 1)[1] + conv(below, w, 1)[1]) * (size // 2) ** 2
    return weights, flops


@pytest.mark.parametrize("res", UNET_ROWS)
def test_unet_has_the_weights_and_flops_of_the_papers_table(res):
    from torch.utils.flop_counter import FlopCounterMode
    config = vars(train.Config(res=res, model="base", net="unet"))
    with torch.device("meta"), torch.no_grad():
        model = sampling.network(config, 0)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, res, res), torch.zeros(1))
    weights, flops = unet_by_hand(res)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert abs(counter.get_total_flops() / flops - 1) < 1e-3


def test_unet_has_attention_at_16_and_8_and_dropout_from_16_down_and_a_dial():
    model = unet.UNet(64, 16, 16, 32, dropout=.1, blocks_16=2)
    seen = []
    for layer in model.modules():
        if isinstance(layer, uvit.ResBlock):
            layer.register_forward_hook(lambda layer, given, made: seen.append((made.shape[-1], layer.dropout.p, 0)))
        if isinstance(layer, unet.MapAttention):
            layer.register_forward_hook(lambda layer, given, made: seen.append(seen.pop()[:2] + (1,)))
    model(torch.randn(1, 3, 64, 64), torch.zeros(1))
    levels = lambda n64, n32, n16, n8: [(64, 0, 0)] * n64 + [(32, 0, 0)] * n32 + [(16, .1, 1)] * n16 + [(8, .1, 1)] * n8
    assert seen == levels(4, 4, 2, 4) + levels(5, 5, 3, 5)[::-1]
    assert unet.UNet(64, 16, 16, 32).up[1].__len__() == 13                       # the paper's 12 + 13


@pytest.mark.parametrize("patch", ["dwt", "conv", "none"])
def test_unet_gives_every_weight_a_gradient_and_starts_at_zero(patch):
    model, size = small_unet("320x384", patch=patch, portrait=True), (1, 3, 320, 384)
    assert model(torch.randn(size), torch.zeros(1), torch.tensor([3])).abs().max() == 0
    random_weights(model).float()
    model(torch.randn(size), torch.zeros(1), torch.tensor([[3, 1]])).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.levels == (2 if patch == "dwt" else 0) and len(model.down) == (7 if patch == "none" else 5)


@torch.no_grad()
def test_attention_of_the_unet_is_that_of_the_uvit_among_the_pixels_of_a_map():
    torch.manual_seed(0)
    block, x = random_weights(unet.MapAttention(8, 4)).float(), torch.randn(2, 8, 3, 5)
    tokens = torch.stack([x[:, :, i // 5, i % 5] for i in range(15)], 1)
    out, by_hand = block(x), uvit.AttentionBlock.forward(block, tokens)
    assert out.shape == x.shape and all(torch.allclose(out[:, :, i // 5, i % 5], by_hand[:, i], atol=1e-6) for i in range(15))


@torch.no_grad()
def test_unet_hears_clock_class_and_way_up():
    model = random_weights(small_unet(portrait=True)).float()
    z, logsnr, label = torch.randn(2, 3, 32, 32), torch.zeros(2), torch.tensor([[1, 0], [2, 1]])
    out = model(z, logsnr, label)
    changed = lambda other: (other - out).abs().amax((1, 2, 3)) > 1e-4
    assert changed(model(z, logsnr + 1, label)).all()
    assert changed(model(z, logsnr, label + torch.tensor([1, 0]))).all() and changed(model(z, logsnr, label * torch.tensor([1, 0]))).tolist() == [False, True]
    assert torch.equal(model(z, logsnr), model(z, logsnr, torch.full((2,), model.classes)))


@torch.no_grad()
def test_each_skip_of_the_unet_is_popped_in_reverse_and_changes_the_output():
    model, given, taken = random_weights(small_unet()).float(), [], []
    for pool, level in zip(model.pool, model.down):
        for made in [pool, *(attention for _, attention in level)]:
            made.register_forward_hook(lambda module, args, out: given.append(out))
    blocks = [block for level in model.up for block, _ in level]
    hooks = [block.norm_skip.register_forward_pre_hook(lambda module, args: taken.append(args[0])) for block in blocks]
    z = torch.randn(1, 3, 32, 32)
    out = model(z, torch.zeros(1))
    assert len(given) == len(taken) == 4 + 1 + 4 + 3 and all(a is b for a, b in zip(taken, given[::-1]))
    for block, hook in zip(blocks, hooks):
        hook.remove()
        hook = block.norm_skip.register_forward_pre_hook(lambda _, args: (torch.zeros_like(args[0]),))
        assert (model(z, torch.zeros(1)) - out).abs().max() > 1e-5
        hook.remove()
