"""unet.py: the U-Net that the paper compares with."""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import checkpoint
import config as config_module
import unet
import uvit
from tests.helpers import condition, random_weights, small_unet

# The paper's table, by size of the pictures: sides, widths and ResBlocks (on the way down) of each
# level, and channels of the input.
UNET_ROWS = {
    128: ([128, 64, 32, 16, 8], [128, 256, 512, 1024, 1024], [3, 4, 4, 12, 4], 3),
    256: ([256, 128, 64, 32, 16, 8], [128, 128, 256, 512, 1024, 1024], [1, 2, 2, 4, 12, 4], 3),
    512: ([128, 64, 32, 16, 8], [256, 384, 512, 1024, 1024], [3, 3, 4, 12, 4], 48)}


def unet_by_hand(res, emb=1024):
    """Weights of a row of the paper's table, and its multiplications and additions (2 each)."""
    sizes, widths, blocks, channels = UNET_ROWS[res]
    conv = lambda a, b, k: (a * b * k * k + b, 2 * a * b * k * k)   # weights, FLOPs a pixel
    weights = (conv(channels, widths[0], 3)[0] + conv(widths[0], channels, 3)[0] + 2 * widths[0]
               + 2 * (emb * emb + emb))
    flops = (conv(channels, widths[0], 3)[1] + conv(widths[0], channels, 3)[1]) * sizes[0] ** 2
    flops += 2 * 2 * emb * emb
    for size, w, n in zip(sizes, widths, blocks):
        block = 2 * conv(w, w, 3)[0] + (emb * 2 * w + 2 * w) + 2 * 2 * w
        work = 2 * conv(w, w, 3)[1] * size**2 + 2 * emb * 2 * w
        if size <= 16:                      # norm, q k v, q and k per head, output
            block += 2 * w + 4 * (w * w + w) + 2 * 64
            work += 2 * 4 * w * w * size**2 + 2 * 2 * size**4 * w
        weights += (2 * n + 1) * block + (n + 1) * 2 * w    # n down, n + 1 up, with a norm each
        flops += (2 * n + 1) * work                         # for its skip
    for size, w, below in zip(sizes, widths, widths[1:]):
        weights += conv(w, below, 1)[0] + conv(below, w, 1)[0]
        flops += (conv(w, below, 1)[1] + conv(below, w, 1)[1]) * (size // 2) ** 2
    return weights, flops


@pytest.mark.parametrize("res", UNET_ROWS)
def test_unet_has_the_weights_and_flops_of_the_papers_table(res):
    config = config_module.Config(res=res, model="base", architecture="unet")
    with torch.device("meta"), torch.no_grad():
        model = checkpoint.build_network(**config.network_settings(0))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, res, res), torch.zeros(1))
    weights, flops = unet_by_hand(res)
    assert sum(p.numel() for p in model.parameters()) == weights
    assert abs(counter.get_total_flops() / flops - 1) < 1e-3


def test_unet_has_attention_at_16_and_8_dropout_from_16_down_and_a_number_of_blocks_at_16():
    model, ran = unet.UNet(64, 16, 16, 32, dropout=.1, blocks_16=2), []

    def after_block(block, args, out):
        ran.append((out.shape[-1], block.dropout.p, 0))

    def after_attention(attention, args, out):
        ran.append(ran.pop()[:2] + (1,))

    for layer in model.modules():
        if isinstance(layer, uvit.ResBlock):
            layer.register_forward_hook(after_block)
        if isinstance(layer, unet.MapAttention):
            layer.register_forward_hook(after_attention)
    model(torch.randn(1, 3, 64, 64), torch.zeros(1))

    def levels(*blocks):                                # side, dropout, attention
        kinds = (64, 0, 0), (32, 0, 0), (16, .1, 1), (8, .1, 1)
        return [kind for kind, count in zip(kinds, blocks) for _ in range(count)]

    assert ran == levels(4, 4, 2, 4) + levels(5, 5, 3, 5)[::-1]
    assert len(unet.UNet(64, 16, 16, 32).up[1]) == 13   # the paper's 12 + 13


@pytest.mark.parametrize("patch", ["dwt", "conv", "none"])
def test_unet_gives_every_weight_a_gradient_and_starts_at_zero(patch):
    model, size = small_unet("320x384", patch=patch, portrait=True), (1, 3, 320, 384)
    assert model(torch.randn(size), torch.zeros(1), condition([3])).abs().max() == 0
    random_weights(model).float()
    v_hat = model(torch.randn(size), torch.zeros(1), condition([3], [1]))
    v_hat.square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())
    assert model.wavelet_levels == (2 if patch == "dwt" else 0)
    assert len(model.down) == (7 if patch == "none" else 5)


@torch.no_grad()
def test_attention_of_the_unet_is_that_of_the_uvit_among_the_pixels_of_a_map():
    torch.manual_seed(0)
    block, x = random_weights(unet.MapAttention(8, 4)).float(), torch.randn(2, 8, 3, 5)
    tokens = torch.stack([x[:, :, i // 5, i % 5] for i in range(15)], 1)
    out, by_hand = block(x), uvit.AttentionBlock.forward(block, tokens)
    assert out.shape == x.shape
    assert all(torch.allclose(out[:, :, i // 5, i % 5], by_hand[:, i], atol=1e-6)
               for i in range(15))


@torch.no_grad()
def test_output_of_the_unet_depends_on_logsnr_class_and_orientation():
    model = random_weights(small_unet(portrait=True)).float()
    z, logsnr, cond = torch.randn(2, 3, 32, 32), torch.zeros(2), condition([1, 2], [0, 1])
    out = model(z, logsnr, cond)
    changed = lambda other: ((other - out).abs().amax((1, 2, 3)) > 1e-4).tolist()
    assert changed(model(z, logsnr + 1, cond)) == [True, True]
    assert changed(model(z, logsnr, condition([2, 3], [0, 1]))) == [True, True]
    assert changed(model(z, logsnr, condition([1, 2], [0, 0]))) == [False, True]
    assert torch.equal(model(z, logsnr), model(z, logsnr, condition([-1, -1], [0, 0])))
    assert changed(model(z, logsnr)) == [True, True]


@torch.no_grad()
def test_skips_of_the_unet_are_taken_last_in_first_out_and_each_changes_the_output():
    model, made, taken = random_weights(small_unet()).float(), [], []
    for pool, level in zip(model.pool, model.down):
        for layer in [pool, *(attention for _, attention in level)]:
            layer.register_forward_hook(lambda module, args, out: made.append(out))
    blocks = [block for level in model.up for block, _ in level]
    hooks = [block.norm_skip.register_forward_pre_hook(lambda module, args: taken.append(args[0]))
             for block in blocks]
    z = torch.randn(1, 3, 32, 32)
    out = model(z, torch.zeros(1))
    assert len(made) == len(taken) == 4 + 1 + 4 + 3
    assert all(a is b for a, b in zip(taken, made[::-1]))
    for block, hook in zip(blocks, hooks):
        hook.remove()
        hook = block.norm_skip.register_forward_pre_hook(
            lambda module, args: (torch.zeros_like(args[0]),))
        assert (model(z, torch.zeros(1)) - out).abs().max() > 1e-5
        hook.remove()
