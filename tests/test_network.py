"""uvit.py and sid2.py beside the paper's sentences: every size and option, and how they are chosen.

The sentences themselves are in test_all.py.
"""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import config as config_module
import checkpoint
import loss as losses
import schedule
import sid2
import text
import train
import uvit
from attention import dot_product_attention
from tests.helpers import condition, random_weights, run_train, small_uvit


def trained(model, steps=4, res=32):
    """A few steps of Adam. (One alone moves only the output layer, since all else has no gradient.)
    """
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    x, cond = torch.rand(4, 3, res, res) * 2 - 1, condition([0, 1, 2, 3])
    for _ in range(steps):
        loss = losses.diffusion_loss(model, x, torch.rand(4), torch.randn_like(x),
                                     schedule.logsnr_cosine, cond)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def weights_without_gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return [name for name, p in model.named_parameters()
            if p.grad is None or p.grad.abs().max() == 0]


# ---------------------------------------------------------------------------- the U-ViT

@pytest.mark.parametrize("patch", ["dwt", "conv", "none"])
def test_every_patch_keeps_the_shape_and_gives_every_weight_a_gradient(patch):
    model = small_uvit(256, patch=patch, widths=(8, 8, 8, 16), head_dim=8)
    model, z = trained(model, steps=3, res=256), torch.randn(1, 3, 256, 256)
    v_hat = model(z, torch.zeros(1), condition([3]))
    assert v_hat.shape == z.shape
    assert not weights_without_gradient(model, v_hat.square().sum())


@torch.no_grad()
def test_inverse_wavelet_is_in_float32_under_autocast():
    """In bfloat16, of 8 bits, the picture put together from its bands would be rounded again."""
    model = random_weights(small_uvit(160)).float()
    with torch.autocast("cpu", torch.bfloat16):
        v_hat = model(torch.randn(1, 3, 160, 160), torch.zeros(1))
    assert model.wavelet_levels == 1 and v_hat.dtype == torch.float32
    assert not torch.equal(v_hat, v_hat.bfloat16().float())


@torch.no_grad()
def test_each_block_is_the_identity_at_the_start():
    x, emb = torch.randn(2, 9, 16), torch.randn(2, 8)
    assert uvit.MLPBlock(16, 8, 0.0)(x, emb).equal(x)
    assert uvit.AttentionBlock(16, 8)(x).equal(x)
    h, skip = torch.randn(2, 2, 16, 6, 6)
    assert uvit.ResBlock(16, 8, 0.0, has_skip=True)(h, emb, skip).equal(h)


@pytest.mark.parametrize("N", [5, 64, 65])      # by hand up to 64
def test_attention_in_bfloat16_is_that_of_float64_up_to_rounding(N):
    q, k, v = torch.randn(3, 2, 3, N, 16, dtype=torch.float64)
    expected = torch.einsum("bhij,bhjc->bhic",
                            torch.softmax(torch.einsum("bhic,bhjc->bhij", q, k) / 4, -1), v)
    h = dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.allclose(h.double(), expected, atol=0.05)


@pytest.mark.parametrize("compiling", [False, True])
def test_upsampling_makes_each_value_a_square(monkeypatch, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    h = torch.randn(2, 3, 4, 5)
    squares = np.kron(h.numpy(), np.ones((2, 2)))
    assert np.array_equal(uvit.Upsample()(h).numpy(), squares)


def test_on_a_cpu_the_largest_maps_of_training_are_channels_last(monkeypatch, tmp_path, little):
    layouts = []

    def note(layer, inputs, h):
        layouts.extend(a.is_contiguous(memory_format=torch.channels_last) for a in (*inputs, h))

    def loss(model, *args, **options):
        for layer in (model.project_in, model.project_out):
            layer.register_forward_hook(note)
        return losses.diffusion_loss(model, *args, **options)

    monkeypatch.setattr(train, "diffusion_loss", loss)
    run_train(tmp_path / "run", "--steps", 1)
    assert layouts == [True] * 4


@pytest.mark.parametrize("res, H, W", [(64, 16, 16), ("32x48", 8, 12)])
def test_positions_may_start_as_sines_of_periods_from_2_tokens_to_twice_the_side(res, H, W):
    position = small_uvit(res, position_init="sines").position[0].detach().numpy()
    assert position.shape == (64, H, W)
    for i, period in enumerate(np.geomspace(2, 2 * max(H, W), 16)):
        for y, x in [(0, 0), (1, 3), (H - 1, W - 2)]:
            expected = [f(2 * math.pi * at / period) / 2
                        for at in (y, x) for f in (math.sin, math.cos)]
            np.testing.assert_allclose(position[i::16, y, x], expected, atol=1e-4)


def test_positions_start_as_sines_in_the_three_smallest_presets():
    assert [name for name, preset in uvit.PRESETS.items()
            if preset["network"]["position_init"] == "sines"] == ["laptop", "tiny", "mini"]


@pytest.mark.parametrize("net, res, width", [
    ("uvit", "64", 16), ("uvit", "256", 24), ("uvit", "384x640", 96), ("uvit", "1024", 128),
    ("unet", "256", 16), ("unet", "384x640", 96)])
def test_top_level_is_twice_as_wide_as_there_are_bands(net, res, width):
    config = train.parse_config(["--res", res, "--model", "tiny", "--set", f"architecture={net}"])
    with torch.device("meta"):
        model = checkpoint.build_network(**config.network_settings(0))
    assert model.project_in.out_channels == model.norm_out.num_channels == width


@pytest.mark.parametrize("flags, widths, blocks", [
    ("--res 64", (64, 96, 192), (1, 2)), ("--res 128", (32, 64, 96, 192), (1, 1, 2)),
    ("--res 256 --set patch=none", (32, 32, 64, 96, 192), (1, 1, 1, 2)),
    ("--res 512 --set patch=none", (32, 32, 32, 64, 96, 192), (1, 1, 1, 1, 2))])
def test_stages_of_a_preset_are_its_last_ones_and_the_first_repeated(flags, widths, blocks):
    config = train.parse_config(["--model", "mini", *flags.split()])
    with torch.device("meta"):
        model = checkpoint.build_network(**config.network_settings(0))
    of_stages = [[block.conv_in.in_channels for block in stage] for stage in model.down]
    assert of_stages == [[width] * count for width, count in zip(widths, blocks)]
    assert model.position.shape[1] == widths[-1]


@pytest.mark.parametrize("res, top, width", [("64", 64, 16), ("512", 128, 96)])
def test_laptop_has_its_transformer_at_8_x_8(res, top, width):
    with torch.device("meta"):
        model = checkpoint.build_network(**train.parse_config(["--res", res]).network_settings(0))
    assert model.position.shape == (1, 128, 8, 8) and len(model.down) == len(model.pool)
    assert top == 8 * 2 ** len(model.pool) and model.project_in.out_channels == width


def test_output_depends_on_the_input_at_the_same_place_in_a_picture_that_is_not_square():
    model = random_weights(small_uvit("16x48")).float().eval()
    z = torch.randn(1, 3, 16, 48, requires_grad=True)
    model(z, torch.zeros(1), condition([1]))[0, 0, 3, 44].backward()
    y, x = divmod(z.grad[0].abs().sum(0).flatten().argmax().item(), 48)
    assert abs(y - 3) <= 2 and abs(x - 44) <= 2


def test_network_refuses_options_and_captions_that_do_not_fit():
    model, z = small_uvit(text=text.ByteEncoder(6, 64)), torch.zeros(1, 3, 32, 32)
    for cond in (None, condition(), condition([3]), condition([3], [0], [[5, 6, 0, 0, 0, 0]])):
        assert model(z, torch.zeros(1), cond).shape == z.shape
    for length in (1, 5, 8):
        with pytest.raises(AssertionError, match=rf"must be \(1, 6\), not \(1, {length}\)"):
            model(z, torch.zeros(1), condition(tokens=[[0] * length]))
    with pytest.raises(AssertionError, match="'wave'"):
        small_uvit(position_init="wave")
    with pytest.raises(AssertionError, match="'fft'"):
        small_uvit(patch="fft")
    with pytest.raises(AssertionError, match="8 must divide the sides of 72x102"):
        small_uvit("72x102")


# ---------------------------------------------------------------------------- one skip per level

@torch.no_grad()
def test_skip_of_a_level_is_up_of_h_less_h_after_plus_h_before():
    """SiD2's, in a U-ViT of one level without blocks: h = up(h - h_after) + h_before."""
    shape = 32, (8, 8, 8, 16), (0, 0, 0), 0, 8, 8   # res, widths, blocks, depth, head_dim, emb
    model = random_weights(sid2.ResidualUViT(*shape)).float()
    z = torch.randn(1, 3, 32, 32)
    before = model.project_in(z)
    after = model.pool[0](before)
    h = model.upsample[0](after + model.position - after) + before
    by_hand = model.project_out(F.silu(model.norm_out(h)))
    assert torch.allclose(model(z, torch.zeros(1)), by_hand, atol=1e-5)
    plain = uvit.UViT(*shape)
    plain.load_state_dict(model.state_dict())
    assert not torch.allclose(plain(z, torch.zeros(1)), by_hand, atol=1e-3)


def test_one_skip_per_level_gives_every_weight_a_gradient():
    model = trained(small_uvit(64, sid2.ResidualUViT), res=64)
    assert not any("norm_skip" in name for name in model.state_dict())
    x = torch.rand(4, 3, 64, 64)
    loss = losses.diffusion_loss(model, x, torch.rand(4), torch.randn_like(x),
                                 schedule.logsnr_cosine, condition([0, 1, 2, -1]))
    assert not weights_without_gradient(model, loss)


# ---------------------------------------------------------------------------- what --res chooses

@pytest.mark.parametrize("flags, chosen", [         # on a machine with CUDA
    ("", dict(model="laptop", batch=16, optimizer="muon", multiscale=False)),
    ("--model tiny", dict(batch=32, optimizer="adam")),
    ("--set optimizer=adam", dict(model="laptop", optimizer="adam")),
    ("--res 65x64", None),
    ("--res 128", dict(model="base", batch=256, steps=300_000, multiscale=False)),
    ("--res 256", dict(model="base", multiscale=False)),
    ("--res 512", dict(multiscale=True)),
    ("--res 384x640", dict(multiscale=False)),
    ("--res 512x1024", dict(multiscale=True)),
    ("--res 512 --loss sid2", dict(multiscale=False)),
    ("--res 64 --set multiscale=on", dict(multiscale=True)),
    ("--res 128 --model paper", dict(batch=2048, steps=500_000, lr=1e-4)),
    ("--res 256 --model paper --set architecture=unet", dict(batch=512, steps=2_000_000, lr=5e-5)),
    ("--res 128 --model base --set architecture=unet", dict(batch=256, lr=2e-4)),
    ("--model paper --batch 7 --lr 1e-3", dict(batch=7, lr=1e-3, steps=500_000))])
def test_res_and_model_choose_batch_rate_steps_and_multiscale(monkeypatch, flags, chosen):
    monkeypatch.setattr(config_module, "has_cuda", lambda: True)
    if chosen is None:
        with pytest.raises(SystemExit):
            train.parse_config(flags.split())
    else:
        config = vars(train.parse_config(flags.split()))
        assert {name: config[name] for name in chosen} == chosen
