"""train.py: options that reach the run, and gradients, weights and pictures that are not fit."""
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import sample as sampling
import schedule
import train
import uvit
from test_all import SMALL, assert_same_bits, log_lines, one_line, run_train, write_folder


def test_recompute_runs_each_block_twice_and_learns_the_same(tmp_path, little, monkeypatch):
    calls, honest = [], uvit.MLPBlock.forward
    monkeypatch.setattr(uvit.MLPBlock, "forward", lambda self, *args: calls.append(self) or honest(self, *args))
    plain = run_train(tmp_path / "plain", "--steps", "2", "--dropout", ".3")
    once = len(calls)
    again = run_train(tmp_path / "again", "--steps", "2", "--dropout", ".3", "--recompute")
    assert len(calls) == 3 * once                           # the masks of dropout, too, are the same
    assert_same_bits(plain["model"], again["model"])


def test_loader_processes_do_not_change_the_run(tmp_path, little):
    write_folder(tmp_path / "set", 12)
    runs = [run_train(tmp_path / n, "--data", str(tmp_path / "set"), "--steps", "4", "--workers", n) for n in "02"]
    assert_same_bits(*(run["model"] for run in runs))


def test_captions_are_dropped_for_their_share_and_the_way_up_is_not(tmp_path, little, monkeypatch):
    honest, seen = train.diffusion_loss, []
    monkeypatch.setattr(train, "diffusion_loss", lambda net, x, t, eps, logsnr, label, *rest: seen.append(label)
                        or honest(net, x, t, eps, logsnr, label, *rest))
    run_train(tmp_path, "--res", "16x32", "--portrait", "--text", "bytes", "--steps", "50", "--drop-label", ".3")
    rows = torch.cat(seen)
    empty = (rows[:, 2:] == 0).all(1)
    assert rows.shape == (400, 130) and abs(empty.float().mean() - .3) < .06 and abs(rows[:, 1].float().mean() - .5) < .08
    assert .2 < rows[empty, 1].float().mean() < .8


def test_flags_of_pictures_reach_the_loader_and_the_grid_shows_each_class(tmp_path, little, monkeypatch):
    write_folder(tmp_path / "set")
    monkeypatch.setattr(train, "REPORT_STEPS", 1)
    honest, asked, drawn, drawing = data.Pictures, [], [], train.sample
    monkeypatch.setattr(train, "Pictures", lambda *args, **told: asked.append((args[1:], told)) or honest(*args, **told))
    monkeypatch.setattr(train, "sample", lambda model, logsnr, noise, steps, label, **rest: drawn.append(label) or drawing(model, logsnr, noise, steps, label, **rest))
    common = ["--data", str(tmp_path / "set"), "--batch", "4", "--steps", "1", "--sample-every", "1"]
    run_train(tmp_path / "plain", *common)
    run_train(tmp_path / "all", *common, "--res", "16x32", "--no-flip", "--portrait", "--seed", "3")
    assert asked == [((32, 0, True), dict(tokens=None, portrait=False)), (("16x32", 3, False), dict(tokens=None, portrait=True))]
    classes = len(checkpoint.read(tmp_path / "plain/model.pt")["classes"])
    assert classes > 1 and all(label.tolist() == [[i % classes, 0] for i in range(4 * classes)] for label in drawn)


@pytest.mark.parametrize("flags", ["--net unet --blocks-16 1 --res 16", "--res 32x48 --portrait --schedule interpolated --loss sid2 --skips level", "--text bytes --blocks-16 1"])
def test_every_network_trains_resumes_and_draws(tmp_path, little, flags, monkeypatch):
    monkeypatch.setattr(train, "REPORT_STEPS", 2)
    flags, kinds, honest = [*flags.split(), "--sample-every", "2", "--save-every", "1"], set(), train.diffusion_loss
    monkeypatch.setattr(train, "diffusion_loss", lambda *args: kinds.update(args[6:7]) or honest(*args))
    whole = run_train(tmp_path / "whole", "--steps", "3", *flags)
    run_train(tmp_path / "run", "--steps", "2", *flags)
    assert_same_bits(whole["model"], run_train(tmp_path / "run", "--steps", "3", *flags)["model"])
    common = ["--ckpt", str(tmp_path / "run/model.pt"), "--n", "3", "--steps", "3",
              "--schedule", "cosine" if "interpolated" in flags else "interpolated"]
    sampling.main([*common, "--out", str(tmp_path / "lying")])
    sampling.main([*common[:-2], "--out", str(tmp_path / "own")])
    assert (tmp_path / "own/grid.png").read_bytes() != (tmp_path / "lying/grid.png").read_bytes()    # another schedule
    H, W = schedule.sides(whole["config"]["res"])
    assert Image.open(tmp_path / "lying/000000.png").size == (W, H)
    if "--portrait" in flags:
        sampling.main([*common, "--out", str(tmp_path / "upright"), "--portrait"])
        stands, lies = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("upright", "lying"))
        assert stands.shape == (3, W, H, 3) and lies.shape == (3, H, W, 3)
        assert not np.array_equal(np.rot90(stands, 1, (1, 2)), lies)            # the network was told
        for name, also in ("upright", ["--portrait"]), ("lying", []):           # what is there is not drawn again, nor was it before these flags
            settings, when = tmp_path / name / "settings.json", (tmp_path / name / "000000.png").stat().st_mtime_ns
            told = json.loads(settings.read_text())
            settings.write_text(json.dumps({key: value for key, value in told.items() if also or key not in ("portrait", "guidance_interval")}))
            sampling.main([*common, "--out", str(tmp_path / name), *also])
            assert (tmp_path / name / "000000.png").stat().st_mtime_ns == when
    else:
        assert len({name.split(".")[1] for name in whole["model"] if name.startswith("transformer.")} | {""}) == 1 + ("--text" in flags)
    assert kinds == {"sid2" if "sid2" in flags else "eps"}
    assert ("--skips" in flags) == (not any("norm_skip" in name for name in whole["model"]))


def test_bias_reaches_the_loss_and_is_of_sid2_alone(tmp_path, little, monkeypatch, capsys):
    honest, seen = train.diffusion_loss, []
    monkeypatch.setattr(train, "diffusion_loss", lambda *args: seen.append(args[6:]) or honest(*args))
    for flags in ([], ["--bias", "-4"], ["--bias", "0"]):
        run_train(tmp_path / "_".join(["run", *flags]), "--steps", "1", "--loss", "sid2", *flags)
    assert seen == [("sid2", False, None), ("sid2", False, -4.0), ("sid2", False, 0.0)]
    again = [*SMALL, "--out", tmp_path / "run_--bias_-4", "--steps", "2", "--loss", "sid2"]
    assert "was started with --bias -4.0, now None" in one_line(capsys, train.main, again)
    train.main([str(part) for part in [*again, "--bias=-4.00"]])        # the same number
    assert one_line(capsys, train.main, ["--bias", "-4"]) == "--bias -4.0: must be from -20 to 20, with --loss sid2\n"
    assert one_line(capsys, train.main, ["--loss", "sid2", "--bias", "-21"]).startswith("--bias -21.0: must be from")
    assert one_line(capsys, train.main, ["--loss", "sid2", "--bias", "low"]).startswith("--bias low: must be a finite number")


def test_training_leaves_no_graph_behind(tmp_path, little, monkeypatch):
    """The EMA is plain weights: were it part of a graph, every step would keep a little memory for ever."""
    kept = []
    real = torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_", lambda a, b, weight: (real(a, b, weight), kept.extend(a)))
    train.main([*SMALL, "--out", str(tmp_path), "--steps", "2"])
    assert kept and not any(tensor.requires_grad or tensor.grad_fn for tensor in kept)


def test_gradient_that_is_not_finite_never_reaches_the_weights(tmp_path, little, monkeypatch, capsys):
    honest, calls = train.diffusion_loss, []

    def sometimes_nan(*args, **kwargs):
        calls.append(0)
        return honest(*args, **kwargs) * (float("nan") if 2 <= len(calls) <= 3 else 1)
    monkeypatch.setattr(train, "diffusion_loss", sometimes_nan)
    saved = run_train(tmp_path / "some", "--steps", "4")
    assert all(torch.isfinite(w).all() for w in [*saved["model"].values(), *saved["ema"].values()])
    assert [line["skipped"] for line in log_lines(tmp_path / "some")] == [0, 1, 2, 2]

    assert all(math.isfinite(line["loss"]) for line in log_lines(tmp_path / "some") if line["loss"] is not None)
    assert [line["norm"] for line in log_lines(tmp_path / "some")][1:3] == [None, None]         # JSON knows no NaN

    monkeypatch.setattr(train, "diffusion_loss", honest)
    run_train(tmp_path / "some", "--steps", "5")
    assert log_lines(tmp_path / "some")[-1]["skipped"] == 2                                     # of the whole run

    calls.clear()
    monkeypatch.setattr(train, "diffusion_loss", lambda *args: calls.append(0) or honest(*args) * float("nan" if len(calls) > 3 else 1))
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "all", "--steps", "30", "--save-every", "3", "--log-every", "100")
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and line.startswith("step 13: the last 10 gradients were not finite; the last good checkpoint is ")
    assert "all/ckpt-00000012.pt" in line               # by step 12 nothing but step 3's weights
    saved = checkpoint.read(tmp_path / "all/ckpt-00000012.pt")
    assert all(torch.isfinite(w).all() for w in [*saved["model"].values(), *saved["ema"].values()]) and saved["skipped"] == 9


def test_weights_that_are_not_finite_are_never_saved(tmp_path, little, monkeypatch, capsys):
    honest = torch._foreach_lerp_

    def spoil(averages, weights, share):
        honest(averages, weights, share)
        if share < .85:                                 # from the fourth step on
            weights[0].data[0] = float("inf")
    monkeypatch.setattr(torch, "_foreach_lerp_", spoil)
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path, "--steps", "6", "--save-every", "1")
    steps = sorted(tmp_path.glob("ckpt-*.pt"))
    assert stop.value.code == 1 and f"the last good checkpoint is {steps[-1]}" in capsys.readouterr().err
    for file in [*steps, tmp_path / "model.pt"]:
        saved = checkpoint.read(file)
        assert all(torch.isfinite(w).all() for w in [*saved.get("model", {}).values(), *saved["ema"].values()])


def test_corrupt_file_is_named_once_in_training(tmp_path, little, capsys):
    """Over several epochs, after a resume, and by loaders: one line, and a count at the end."""
    write_folder(tmp_path / "set", 8)
    (tmp_path / "set/a/bad.png").write_bytes(b"this is not a picture")
    for steps, workers in (("4", "0"), ("6", "0"), ("9", "2")):
        run_train(tmp_path / "run", "--data", str(tmp_path / "set"), "--steps", steps, "--workers", workers)
    printed = "".join(capsys.readouterr())
    assert printed.count("skipped a/bad.png: UnidentifiedImageError") == 1
    assert printed.count(f"1 of 9 pictures could not be read and were skipped: {tmp_path}/run/broken.txt") == 3
    assert (tmp_path / "run/broken.txt").read_text().count("\n") == 1


@pytest.mark.parametrize("workers", "02")
def test_more_than_half_broken_stops_the_run(tmp_path, little, capsys, workers):
    """Twelve of twenty, of which the first sixteen pictures show too few: found out on the way, and nothing is saved."""
    write_folder(tmp_path / "set", 200, (16, 16))
    order = np.random.default_rng((1, 0, 0)).permutation(200)
    names = data.Pictures(tmp_path / "set", 16).names
    for i in order[32:140]:
        (tmp_path / "set" / names[i]).write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "run", "--data", str(tmp_path / "set"), "--res", "16", "--steps", "30", "--workers", workers)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and re.search(r"more than half cannot be read, 1\d\d of 200 so far; .*: Unid", error), error
    assert not list((tmp_path / "run").glob("*.pt"))
