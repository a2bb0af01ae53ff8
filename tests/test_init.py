"""--init: a run that starts from the weights of another."""
import re

import numpy as np
import pytest
import torch

import checkpoint
import sample as sampling
import text
import train
import uvit
import wavelet
from test_all import SMALL, assert_same_bits, one_line, random_weights, run_train, small_unet, small_uvit


@torch.no_grad()
def carried(start, options, same_classes=True):
    """A network of random weights, and one of other options that starts from them."""
    first = random_weights(small_uvit(**(dict(residual=True) | start))).float().eval()
    second = random_weights(small_uvit(**(dict(residual=True) | options))).float().eval()
    for part in second.modules():               # zero at the start
        for last in (getattr(part, name, None) for name in ("conv_out", "linear_out", "project_out")):
            if last is not None and part is not second.embedding:
                uvit.zero(last)
    checkpoint.carry_over(first, second, same_classes)
    return first, second


@torch.no_grad()
@pytest.mark.parametrize("skips, small, large, widths", [("level", 160, 320, (16, 48)), ("block", 160, 320, (16, 48)), ("level", 288, 576, (64, 128)),
                                                         ("level", 72, 144, (16, 16))])
def test_network_of_twice_the_size_does_to_the_low_band_what_it_did_to_the_picture(skips, small, large, widths):
    shape = dict(widths=(widths[0], 16, 16, 32), blocks=(1, 1, 1), residual=skips == "level")
    first, second = carried(dict(shape, res=small), dict(shape, res=large))
    assert (first.project_in.out_channels, second.project_in.out_channels) == widths and second.levels == first.levels + 1
    z, logsnr, label = torch.randn(2, 3, large, large), torch.tensor([-3., 4.]), torch.tensor([1, 10])
    before = first(wavelet.dwt(z, 1)[:, :3], logsnr, label)
    bands = wavelet.dwt(second(z, logsnr, label), 1)
    assert before.abs().max() > .1 and bands[:, 3:].abs().max() == 0
    assert torch.allclose(bands[:, :3], before, atol=1e-4 * before.abs().max())
    if widths[0] < widths[1]:                   # new channels are as in a new network: free to learn
        assert second.project_in.weight[widths[0]:].abs().max() > 0 < second.down[0][0].conv_in.weight[widths[0]:].abs().max()
        with pytest.raises(ValueError, match="another network"):
            checkpoint.carry_over(second, first, True)          # whose first channels are no network


@torch.no_grad()
def test_carried_positions_keep_their_distance_from_the_middle_in_shorter_sides():
    first, second, third = (small_uvit(res, depth=1) for res in (96, "96x160", "72x144"))
    assert [model.position.shape[2:] for model in (first, second, third)] == [(12, 12), (12, 20), (9, 18)]
    checkpoint.carry_over(first, second, True)
    assert torch.allclose(second.position[..., 4:16], first.position, atol=1e-6)
    assert torch.allclose(second.position[..., :4], first.position[..., :1].expand(-1, -1, -1, 4), atol=1e-6)
    y, x = np.mgrid[:12, :12] + .5                      # bilinear between neighbours: slopes stay what they are
    first.position[0, 0], first.position[0, 1] = torch.tensor(y / 12), torch.tensor(x / 12)
    checkpoint.carry_over(first, third, True)
    y, x = np.mgrid[:9, :18] + .5
    inside = lambda at: np.clip(at, .5 / 12, 11.5 / 12)                         # beyond its edge the edge goes on
    assert np.allclose(third.position[0, 0], inside(y / 9), atol=1e-6) and np.allclose(third.position[0, 1], inside((x - 4.5) / 9), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("before, after, same", [
    (dict(classes=10), dict(classes=4), False), (dict(classes=10), dict(classes=10), False), (dict(classes=10), dict(classes=0), False),
    (dict(classes=0), dict(classes=4), False), (dict(classes=0), dict(classes=0, portrait=True), True),
    (dict(classes=4, portrait=True), dict(classes=4), True), (dict(classes=0), dict(classes=0, text=text.ByteEncoder(8, 16)), True)])
def test_conditions_that_are_new_start_unheard_and_of_those_gone_nothing_was_said(before, after, same):
    """Whatever the second network is told, it does what the first does when it is told nothing."""
    first, second = carried(dict(res=32, **before), dict(res=32, **after), same)
    z, logsnr = torch.randn(2, 3, 32, 32), torch.tensor([-3., 4.])
    length = 2 + (8 if after.get("text") else 0)
    told = torch.tensor([[min(1, second.classes), 1, *b"red flow"][:length], [second.classes, 0, *8 * [0]][:length]])
    if same and before["classes"]:
        told[:, 0] = first.classes              # the class goes on being heard
    assert torch.allclose(second(z, logsnr, told), first(z, logsnr), atol=1e-4 * first(z, logsnr).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("net", [small_uvit, lambda **options: small_unet(**options)])
def test_conditions_that_stay_are_carried_over(net):
    first, second = random_weights(net(res=32, portrait=True)).float().eval(), net(res=24, portrait=True).eval()
    checkpoint.carry_over(first, second, True)
    z, logsnr, label = torch.randn(2, 3, 24, 24), torch.tensor([-3., 4.]), torch.tensor([[3, 1], [10, 0]])
    if hasattr(first, "position"):
        first.position = second.position        # 16 x 16 and 12 x 12
    assert torch.allclose(second(z, logsnr, label), first(z, logsnr, label), atol=1e-5)


@pytest.mark.parametrize("options, name", [
    (dict(depth=3), "transformer.2.0"), (dict(depth=1), "transformer.1.0"), (dict(residual=False), "up.0.0.norm_skip"), (dict(emb=64), "film.weight"),
    (dict(blocks=(1, 1, 1)), "down.2.1"), (dict(blocks=(2, 1, 2)), "down.0.1"), (dict(widths=(16, 16, 48, 64)), "down.2.0"), (dict(res=64), "down.1.0"),
    (dict(widths=(16, 16, 32, 96)), "pool.2.1"), (dict(patch="conv"), "project_in")])
def test_weights_of_another_network_are_refused(options, name):
    first, second = (small_uvit(**(dict(residual=True, res=144) | changed)) for changed in ({}, options))
    with pytest.raises(ValueError, match="another network, .*" + re.escape(name)):
        checkpoint.carry_over(first, second, True)


def test_init_starts_from_the_weights_of_another_run_and_is_read_once(tmp_path, little, capsys):
    few = ["--skips", "level", "--blocks-16", "1"]
    run_train(tmp_path / "first", "--steps", "2", "--res", "24", *few)
    first, saved = sampling.load_model(tmp_path / "first/model.pt", "cpu")
    (tmp_path / "first/model.pt").rename(tmp_path / "start.pt")
    flags = [*few, "--res", "24x32", "--portrait", "--init", str(tmp_path / "start.pt")]
    still = run_train(tmp_path / "still", "--steps", "1", "--lr", "1e-30", *flags)
    torch.manual_seed(0)
    model = sampling.network(still["config"], 10)
    checkpoint.carry_over(first, model, True)
    assert all(torch.allclose(still["model"][name], weights, rtol=0, atol=1e-20) for name, weights in model.state_dict().items())
    assert torch.equal(model.embedding.label.weight, first.embedding.label.weight)
    whole = run_train(tmp_path / "whole", "--steps", "2", *flags)
    run_train(tmp_path / "run", "--steps", "1", *flags)
    saved["classes"] = [f"{name} or so" for name in saved["classes"]]
    torch.save(saved, tmp_path / "start.pt")
    other = run_train(tmp_path / "other", "--steps", "1", "--lr", "1e-30", *flags)["model"]["embedding.label.weight"]
    assert other.abs().max() < 1e-20            # as many classes, but others: none is heard yet
    (tmp_path / "start.pt").unlink()
    assert_same_bits(whole["model"], run_train(tmp_path / "run", "--steps", "2", *flags)["model"])
    assert re.match("--init .*start.pt: No such file", one_line(capsys, train.main, [*SMALL, "--out", tmp_path / "new", *flags]))
    wrong = [*SMALL, "--out", tmp_path / "new", "--init", tmp_path / "first" / "ckpt-00000002.pt", "--res", "64"]
    assert re.match("--init another network, .* --res with as many", one_line(capsys, train.main, wrong)) and not (tmp_path / "new").exists()
    checkpoint.release(tmp_path / "still/model.pt", tmp_path / "small.pt")
    assert [checkpoint.read(tmp_path / name)["config"]["init"] for name in ("small.pt", "still/model.pt")] == ["", str(tmp_path / "start.pt")]
