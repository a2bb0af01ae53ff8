"""--init: a run that starts from the weights of another."""
import re

import numpy as np
import pytest
import torch

import checkpoint
import text
import train
import uvit
import wavelet
from sid2 import ResidualUViT
from tests.helpers import (SMALL, assert_same_bits, condition, one_line, random_weights, run_train,
                           small_unet, small_uvit)


@torch.no_grad()
def started(before, after, same_classes=True, net=small_uvit):
    """Two networks of random weights, of which the second starts from the first -> both, and the
    weights that the second had before.
    """
    networks = [net(**options) for options in (before, after)]      # which sets the seed
    first, second = (random_weights(network).float().eval() for network in networks)
    own = {name: weights.clone() for name, weights in second.state_dict().items()}
    checkpoint.copy_weights(first, second, same_classes)
    return first, second, own


@torch.no_grad()
@pytest.mark.parametrize("kind", [uvit.UViT, ResidualUViT])
@pytest.mark.parametrize("small, large, options", [
    (128, 256, dict(widths=(24, 16, 16, 32), blocks=(1, 1, 1))),
    (64, 128, dict(largest_map=64, widths=(16, 24, 32, 64))),
    (64, 128, dict(largest_map=32, widths=(16, 16, 96, 64))),
    ("32x64", "64x128", dict(largest_map=48, widths=(16, 24, 32, 64)))])
def test_network_of_twice_the_size_does_to_the_low_band_what_it_did_to_the_picture(
        kind, small, large, options):
    """One more level of wavelet; what is new of it begins at zero."""
    first, second, _ = started(dict(res=small, kind=kind, **options),
                               dict(res=large, kind=kind, **options))
    assert second.wavelet_levels == first.wavelet_levels + 1
    assert second.position.shape == first.position.shape
    z = torch.randn(2, 3, *checkpoint.height_width(large))
    logsnr, cond = torch.tensor([-3., 4.]), condition([1, -1])
    before = first(wavelet.dwt(z, 1)[:, :3], logsnr, cond)
    bands = wavelet.dwt(second(z, logsnr, cond), 1)
    largest = before.abs().max()
    assert largest > .1 and torch.allclose(bands[:, :3], before, atol=1e-4 * largest)
    assert bands[:, 3:].abs().max() < 1e-4 * largest
    again = second(z + wavelet.idwt(torch.cat([torch.zeros_like(bands[:, :3]),
                                               torch.randn_like(bands[:, 3:])], 1), 1),
                   logsnr, cond)
    assert torch.allclose(wavelet.dwt(again, 1)[:, :3], before, atol=1e-4 * largest)
    for layer in (second.project_in, second.project_out):       # but they are there to be learned
        assert (layer.weight == 0).any() and layer.weight.requires_grad


def interpolated(old, H, W):
    """Bilinear between the middles of pixels, constant beyond the outermost, by a slow loop."""
    h, w = old.shape
    new = np.zeros((H, W))
    for i in range(H):
        for j in range(W):
            y, x = (min(max((k + .5) * m / n - .5, 0), m - 1) for k, n, m in ((i, H, h), (j, W, w)))
            top, left = min(int(y), h - 2), min(int(x), w - 2)
            y, x = y - top, x - left
            corners = old[top:top + 2, left:left + 2]
            new[i, j] = [1 - y, y] @ corners @ [1 - x, x]
    return new


@torch.no_grad()
@pytest.mark.parametrize("res, H, W", [("96x160", 12, 20), ("72x144", 9, 18), (128, 16, 16),
                                       (96, 12, 12)])
def test_positions_are_interpolated(res, H, W):
    first, second, _ = started(dict(res=96, depth=1), dict(res=res, depth=1))
    assert first.position.shape[2:] == (12, 12) and second.position.shape[2:] == (H, W)
    for old, new in zip(first.position[0, :4].double(), second.position[0, :4].double()):
        assert np.allclose(new, interpolated(old.numpy(), H, W), atol=1e-5)


TEXT = text.ByteEncoder(8, 16)


@torch.no_grad()
@pytest.mark.parametrize("before, after, same, anew", [
    (dict(classes=10), dict(classes=4), False, "embedding.label"),
    (dict(classes=10), dict(classes=10), False, "embedding.label"),
    (dict(classes=10), dict(classes=0), False, None),
    (dict(classes=0), dict(classes=4), False, "embedding.label"),
    (dict(classes=0), dict(classes=0, portrait=True), True, "embedding.portrait"),
    (dict(classes=4, portrait=True), dict(classes=4), True, None),
    (dict(classes=0), dict(classes=0, text=TEXT), True, r"text|embedding.text|transformer.\d.2"),
    (dict(classes=0, text=TEXT), dict(classes=0), True, None),
    (dict(classes=4, portrait=True), dict(classes=4, portrait=True), True, None),
    (dict(classes=4, portrait=True), dict(classes=4, portrait=True), False, "embedding.label"),
    (dict(classes=0, text=text.ByteEncoder(8, 16)), dict(classes=0, text=TEXT), True, None)])
def test_conditioning_that_is_new_starts_anew_and_all_else_goes_on(before, after, same, anew):
    first, second, own = started(dict(res=32, **before), dict(res=32, **after), same)
    old, found = first.state_dict(), set()
    for name, weights in second.state_dict().items():
        new = re.match(anew, name) if anew else None
        assert torch.equal(weights, own[name] if new else old[name]), name
        found |= {new[0]} if new else set()
    assert bool(found) == bool(anew)
    if anew is None and before == after:
        z, logsnr, cond = torch.randn(2, 3, 32, 32), torch.tensor([-3., 4.]), condition([3, -1])
        assert torch.equal(first(z, logsnr, cond), second(z, logsnr, cond))


@torch.no_grad()
def test_a_unet_too_goes_on_at_another_size():
    first, second, _ = started(dict(res=32, portrait=True), dict(res=24, portrait=True),
                               net=small_unet)
    z, logsnr = torch.randn(2, 3, 24, 24), torch.tensor([-3., 4.])
    cond = condition([3, -1], [1, 0])
    assert torch.allclose(second(z, logsnr, cond), first(z, logsnr, cond), atol=1e-5)


WIDTHS = 24, 24, 32, 64


@pytest.mark.parametrize("options, name", [
    (dict(depth=3), "transformer.2.0"), (dict(depth=1), "transformer.1.0"),
    (dict(kind=uvit.UViT), "up.0.0.norm_skip"), (dict(emb_dim=64), "down.0.0.film.weight"),
    (dict(blocks=(1, 1, 1)), "down.2.1"), (dict(blocks=(2, 1, 2)), "down.0.1"),
    (dict(widths=(24, 24, 48, 64)), "down.2.0"), (dict(widths=(32, 24, 32, 64)), "down.0.0"),
    (dict(widths=(24, 24, 32, 96)), "pool.2.1"), (dict(head_dim=16), "transformer.0.1.norm_k"),
    (dict(res=64), "down.1.0"), (dict(res=72), "project_in.weight"),
    (dict(patch="conv"), "project_in.weight"), (dict(patch="none"), "down.2.0"),
    (dict(res=144, largest_map=72), None)])
def test_any_other_difference_is_refused_by_name(options, name):
    """Of networks for pictures of 144 pixels, whose largest map is 72 x 72."""
    first, second = (small_uvit(**(dict(kind=ResidualUViT, res=144, widths=WIDTHS) | changed))
                     for changed in ({}, options))
    if name is None:
        return checkpoint.copy_weights(first, second, True)
    with pytest.raises(ValueError, match="^another trunk, " + re.escape(name)):
        checkpoint.copy_weights(first, second, True)


def test_a_strided_convolution_of_another_stride_is_refused():
    first, second = (small_uvit(res, patch="conv", widths=(96, 16, 32, 64)) for res in (144, 288))
    with pytest.raises(ValueError, match="^another trunk, project_in.weight"):
        checkpoint.copy_weights(first, second, True)


def test_a_unet_does_not_start_a_uvit_nor_the_other_way_round():
    nets = small_uvit(32), small_unet(32)
    for first, second in (nets, nets[::-1]):
        with pytest.raises(ValueError, match="^another trunk, down.0.0"):
            checkpoint.copy_weights(first, second, True)


def test_init_starts_from_the_weights_of_another_run_and_is_read_once(tmp_path, little, capsys):
    few, start = ["--set", "skips=level", "blocks_16=1"], tmp_path / "start.pt"
    run_train(tmp_path / "first", "--steps", "2", "--res", "24", "--seed", "1", *few)
    first, saved = checkpoint.load_model(tmp_path / "first/model.pt", "cpu")
    (tmp_path / "first/model.pt").rename(start)
    flags = [*few, "--res", "24x32", "--portrait", "--init", start]

    def as_started(name, same_classes):
        """Whether a run that hardly moved has the weights that copy_weights gives it."""
        run = run_train(tmp_path / name, "--steps", "1", "--lr", "1e-30", *flags)
        torch.manual_seed(0)
        model = checkpoint.build_network(**run["network"])
        own = model.embedding.label.weight.clone()
        checkpoint.copy_weights(first, model, same_classes)
        wanted = first.embedding.label.weight if same_classes else own
        assert torch.allclose(run["model"]["embedding.label.weight"], wanted, rtol=0, atol=1e-20)
        return all(torch.allclose(run["model"][name], weights, rtol=0, atol=1e-20)
                   for name, weights in model.state_dict().items())
    assert as_started("still", True)
    whole = run_train(tmp_path / "whole", "--steps", "2", *flags)
    run_train(tmp_path / "run", "--steps", "1", *flags)
    saved["classes"] = [f"{name} or so" for name in saved["classes"]]       # as many, but others
    torch.save(saved, start)
    assert as_started("other", False)
    start.unlink()
    resumed = run_train(tmp_path / "run", "--steps", "2", *flags)
    assert_same_bits(whole["model"], resumed["model"])

    new = [*SMALL, "--out", tmp_path / "new"]
    assert re.match("--init .*start.pt: No such file", one_line(capsys, train.main, new + flags))
    wrong = [*new, "--init", tmp_path / "first" / "ckpt-00000002.pt", "--res", "64"]
    error = one_line(capsys, train.main, wrong)
    assert re.match("--init another trunk, .* as many halvings", error)
    assert not (tmp_path / "new").exists()
    checkpoint.release(tmp_path / "still/model.pt", tmp_path / "small.pt")
    assert [checkpoint.read(tmp_path / name)["config"]["init"]
            for name in ("small.pt", "still/model.pt")] == ["", str(start)]
