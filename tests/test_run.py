"""The trainer: options that reach the run; gradients, weights and pictures that are not fit."""
import itertools
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoint
import data
import flowers
import noise
import run
import sample as sampling
import schedule
import sid2
import text
import train
import uvit
from tests.helpers import (LITTLE, SMALL, assert_same_bits, condition, log_lines, one_line,
                           run_train, small_uvit, write_folder)


def watch_loss(monkeypatch, watcher):
    """Let watcher(net, x, t, eps, **options) see each call of the training loss."""
    honest = train.diffusion_loss

    def watched(*args, **options):
        watcher(*args, **options)
        return honest(*args, **options)
    monkeypatch.setattr(train, "diffusion_loss", watched)


def test_recompute_runs_each_block_twice_and_learns_the_same(tmp_path, little, monkeypatch):
    calls, honest = [], uvit.MLPBlock.forward
    monkeypatch.setattr(uvit.MLPBlock, "forward",
                        lambda self, *args: calls.append(self) or honest(self, *args))
    flags = "--steps 2 --set dropout=.3".split()
    plain = run_train(tmp_path / "plain", *flags)
    once = len(calls)
    again = run_train(tmp_path / "again", *flags, "--recompute")
    assert len(calls) == 3 * once                       # the masks of dropout, too, are the same
    assert_same_bits(plain["model"], again["model"])


def test_loader_processes_do_not_change_the_run(tmp_path, little):
    write_folder(tmp_path / "set", 12)
    runs = [run_train(tmp_path / n, "--data", tmp_path / "set", "--steps", "4", "--set",
                      f"workers={n}") for n in "02"]
    assert_same_bits(*(saved["model"] for saved in runs))


# ---------------------------------------------------------------------------- conditioning

def test_dropped_is_without_class_and_caption_but_keeps_the_orientation():
    tokens = torch.tensor([[5, 6, 0], [7, 0, 0], [0, 0, 0], [8, 9, 9]])
    cond = condition([3, 0, -1, 2], [1, 0, 1, 1], tokens)
    dropped = cond.dropped(torch.tensor([True, False, True, False]))
    assert dropped.label.tolist() == [-1, 0, -1, 2] and dropped.portrait.tolist() == [1, 0, 1, 1]
    assert dropped.tokens.tolist() == [[0, 0, 0], [7, 0, 0], [0, 0, 0], [8, 9, 9]]
    assert cond.label.tolist() == [3, 0, -1, 2] and cond.tokens[0].tolist() == [5, 6, 0]
    for part in ("label", "portrait", "tokens"):             # what is not given stays so
        alone = condition(**{part: getattr(cond, part)}).dropped(torch.ones(4, dtype=bool))
        given = [name for name, value in zip(alone._fields, alone) if value is not None]
        assert given == [part]


@torch.no_grad()
def test_guidance_works_with_captions_alone_and_with_classes_alone():
    """guidance v(cond) + (1 - guidance) v(nothing), each half asked for by itself."""
    encoder = text.ByteEncoder(8, 16)
    for options, cond, nothing in (
            (dict(classes=0, text=encoder), condition(tokens=[text.byte_tokens("red", 8)] * 2),
             condition(tokens=[[0] * 8] * 2)),
            (dict(classes=4), condition([1, 3]), condition([-1, -1])),
            (dict(classes=4, portrait=True), condition([1, 3], [1, 0]),
             condition([-1, -1], [1, 0]))):
        model = small_uvit(16, depth=1, **options).eval()
        for weights in model.parameters():
            torch.nn.init.normal_(weights, std=.1)
        z, logsnr = torch.randn(2, 3, 16, 16), torch.tensor([-1., 2.])
        wanted = 3 * model(z, logsnr, cond) - 2 * model(z, logsnr, nothing)
        assert (model(z, logsnr, cond) - model(z, logsnr, nothing)).abs().max() > 1e-3
        assert torch.allclose(sampling.guided(model, z, logsnr, cond, 3), wanted, atol=1e-5)


def test_captions_are_dropped_for_their_share_and_the_orientation_never(
        tmp_path, little, monkeypatch):
    seen = []
    watch_loss(monkeypatch, lambda net, x, t, eps, cond, **options: seen.append(cond))
    run_train(tmp_path, *"--res 16x32 --portrait --text bytes --steps 50 --set drop_label=.3"
              .split())
    tokens, upright = (torch.cat([getattr(cond, part) for cond in seen])
                       for part in ("tokens", "portrait"))
    empty = (tokens == 0).all(1)
    assert tokens.shape == (400, 128) and abs(empty.float().mean() - .3) < .06
    assert abs(upright.float().mean() - .5) < .08 and .2 < upright[empty].float().mean() < .8
    assert all((cond.label == -1).all() for cond in seen)   # captions in place of classes


def test_options_of_pictures_reach_the_loader_and_the_grid_shows_each_class(
        tmp_path, little, monkeypatch):
    write_folder(tmp_path / "set")
    monkeypatch.setattr(run, "REPORT_STEPS", 1)
    made, drawn, pictures, drawing = [], [], data.Pictures, run.sampling_steps

    def recorded(model, spacing, noise, steps, cond, sampler):
        drawn.append(cond)
        assert (steps, sampler) == (1, "sde")
        side, t = (32, 16 * 2**.5)[len(drawn) - 1], torch.tensor([.3])
        trained = lambda t: schedule.logsnr_shifted(t, side)
        assert torch.allclose(spacing(t), sampling.asinh_spacing(trained, side)(t))
        return drawing(model, spacing, noise, steps, cond, sampler)
    monkeypatch.setattr(data, "Pictures", lambda *args: made.append(args[1:]) or pictures(*args))
    monkeypatch.setattr(run, "sampling_steps", recorded)
    common = ["--data", tmp_path / "set", *"--batch 4 --steps 1 --sample-every 1".split()]
    run_train(tmp_path / "plain", *common)
    run_train(tmp_path / "all", *common, *"--res 16x32 --no-flip --portrait --seed 3".split())
    # size, seed, mirrored, tokens, portrait
    assert [options[:5] for options in made[::2]] == \
        [(32, 0, True, None, False), ("16x32", 3, False, None, True)]      # to check, to train
    classes = len(checkpoint.read(tmp_path / "plain/model.pt")["classes"])
    assert classes > 1 and len(drawn) == 2
    for cond in drawn:
        assert cond.label.tolist() == [i % classes for i in range(4 * classes)]
        assert not cond.portrait.any() and cond.tokens is None


# ---------------------------------------------------------------------------- all networks

@pytest.mark.parametrize("flags", [
    "--res 16 --set architecture=unet blocks_16=1",
    "--res 32x48 --portrait --schedule interpolated --loss sid2 --set skips=level",
    "--text bytes --set blocks_16=1 optimizer=muon"])
def test_every_network_trains_resumes_and_draws(tmp_path, little, flags, monkeypatch):
    monkeypatch.setattr(run, "REPORT_STEPS", 2)
    if "unet" in flags:                         # eight times as wide at the bottom
        monkeypatch.setitem(uvit.PRESETS["laptop"], "network", LITTLE | dict(widths=(4,)))
    weighted = set()
    watch_loss(monkeypatch, lambda net, x, t, eps, weight, **options: weighted.add(bool(weight)))
    words = ["--sample-every", "2", "--save-every", "1", *flags.split()]
    whole = run_train(tmp_path / "whole", "--steps", "3", *words)
    run_train(tmp_path / "run", "--steps", "2", *words)
    resumed = run_train(tmp_path / "run", "--steps", "3", *words)
    assert_same_bits(whole["model"], resumed["model"])
    assert weighted == {"sid2" in flags}
    names = whole["model"]
    assert ("skips=level" in flags) == (not any("norm_skip" in name for name in names))
    if "unet" not in flags:                     # per layer: MLP, attention, and to captions
        parts = {name.split(".")[2] for name in names if name.startswith("transformer.")}
        assert len(parts) == 2 + ("--text" in flags)

    common = ["--ckpt", str(tmp_path / "run/model.pt"), "--n", "3", "--steps", "3", "--sampler",
              "ancestral"]
    other = ["--schedule", "cosine" if "interpolated" in flags else "interpolated"]
    draw = lambda name, *more: sampling.main([*common, "--out", str(tmp_path / name), *more])
    draw("own")
    draw("other", *other)
    own, differs = ((tmp_path / name / "grid.png").read_bytes() for name in ("own", "other"))
    assert own != differs                       # by another schedule
    H, W = schedule.height_width(whole["config"]["res"])
    assert Image.open(tmp_path / "other/000000.png").size == (W, H)
    if "--portrait" not in flags:
        return
    draw("upright", *other, "--portrait")
    upright, wide = (np.load(tmp_path / name / "samples.npz")["arr_0"]
                     for name in ("upright", "other"))
    assert upright.shape == (3, W, H, 3) and wide.shape == (3, H, W, 3)
    assert not np.array_equal(np.rot90(upright, 1, (1, 2)), wide)   # the network was told
    # A finished picture is not drawn again, nor was it before these settings existed.
    for name, more in ("upright", ["--portrait"]), ("other", []):
        settings, when = tmp_path / name / "settings.json", tmp_path / name / "000000.png"
        when = when.stat().st_mtime_ns
        older = json.loads(settings.read_text())
        if not more:
            older = {key: value for key, value in older.items()
                     if key not in ("portrait", "guidance_interval")}
        settings.write_text(json.dumps(older))
        draw(name, *other, *more)
        assert (tmp_path / name / "000000.png").stat().st_mtime_ns == when


def test_bias_reaches_the_weight_of_sid2_and_is_of_no_other_loss(
        tmp_path, little, monkeypatch, capsys):
    t, logsnr = torch.tensor([.2, .7]), schedule.logsnr_schedule("shifted", 32)
    seen = []
    watch_loss(monkeypatch, lambda *args, kind, multiscale, weight, **options:
               seen.append((kind, multiscale, weight(t))))
    for i, bias in enumerate([None, -4, 0]):
        flags = [] if bias is None else ["--set", f"bias={bias}"]
        run_train(tmp_path / f"run{i}", "--steps", "1", "--loss", "sid2", *flags)
        kind, multiscale, weight = seen.pop()
        assert kind == "eps" and not multiscale and not seen
        assert torch.equal(weight, sid2.sigmoid_weight(t, logsnr, 32, bias))
    large = train.parse_config(["--res", "512", "--loss", "sid2"])     # b = -3 by its size
    weight = train.loss_function(large).keywords["weight"](t)
    assert torch.equal(weight, sid2.sigmoid_weight(
        t, schedule.logsnr_schedule("shifted", 512), 512, -3.0))
    again = [*SMALL, "--out", tmp_path / "run1", "--steps", "2", "--loss", "sid2"]
    error = one_line(capsys, train.main, again)
    assert "was started with --set bias=-4.0, now the default" in error
    train.main([*map(str, again), "--set", "bias=-4.00"])       # the same number
    assert one_line(capsys, train.parse_config, ["--set", "bias=-4"]) == \
        "--set bias=-4.0: is for --loss sid2\n"
    for value, words in (("-21", "-21.0: must be at least -20"), ("21", "21.0: must be at most"),
                         ("low", "low: must be a finite number")):
        error = one_line(capsys, train.parse_config, ["--loss", "sid2", "--set", f"bias={value}"])
        assert error.startswith(f"--set bias={words}")


# ---------------------------------------------------------------------------- gradients, weights

def test_losses_that_are_not_finite_are_left_out_of_the_mean(tmp_path, little, monkeypatch):
    honest, seen = train.diffusion_loss, []

    def poisoned(*args, **options):
        loss = honest(*args, **options)
        seen.append(loss.item())
        return loss * (math.nan if len(seen) == 2 else 1)
    monkeypatch.setattr(train, "diffusion_loss", poisoned)
    run_train(tmp_path, "--steps", "1", "--accum", "2")
    (line,) = log_lines(tmp_path)
    assert line["loss"] == pytest.approx(seen[0]) and line["skipped"] == 1


def test_training_leaves_no_graph_behind(tmp_path, little, monkeypatch):
    """The EMA is plain weights: were it part of a graph, every step would keep some memory."""
    kept, honest = [], torch._foreach_lerp_
    monkeypatch.setattr(torch, "_foreach_lerp_",
                        lambda a, b, weight: (honest(a, b, weight), kept.extend(a)))
    run_train(tmp_path, "--steps", "2")
    assert kept and not any(tensor.grad_fn for tensor in kept)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_gradient_that_is_not_finite_never_reaches_the_weights(
        tmp_path, little, monkeypatch, capsys, optimizer):
    monkeypatch.setitem(uvit.PRESETS["laptop"]["training"], "optimizer", optimizer)
    honest, calls = train.diffusion_loss, []

    def spoil(first, last):
        def spoiled(*args, **options):
            calls.append(0)
            return honest(*args, **options) * (math.nan if first <= len(calls) <= last else 1)
        calls.clear()
        monkeypatch.setattr(train, "diffusion_loss", spoiled)

    def finite(saved):
        return all(torch.isfinite(w).all() for w in [*saved["model"].values(),
                                                     *saved["ema"].values()])
    spoil(2, 3)
    assert finite(run_train(tmp_path / "some", "--steps", "4"))
    lines = log_lines(tmp_path / "some")
    assert [line["skipped"] for line in lines] == [0, 1, 2, 2]
    assert all(math.isfinite(line["loss"]) for line in lines if line["loss"] is not None)
    assert [line["norm"] for line in lines][1:3] == [None, None]        # JSON knows no NaN
    monkeypatch.setattr(train, "diffusion_loss", honest)
    run_train(tmp_path / "some", "--steps", "5")
    assert log_lines(tmp_path / "some")[-1]["skipped"] == 2             # of the whole run

    spoil(1, 1)
    run_train(tmp_path / "first", "--steps", "1")
    monkeypatch.setattr(train, "diffusion_loss", honest)
    assert run_train(tmp_path / "first", "--steps", "2")["skipped"] == 1

    spoil(4, 99)
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "all", *"--steps 30 --save-every 3 --log-every 100".split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1 and "all/ckpt-00000012.pt" in line
    assert line.startswith("step 13: the last 10 gradients were not finite; the last good "
                           "checkpoint is ")
    saved = checkpoint.read(tmp_path / "all/ckpt-00000012.pt")          # still step 3's weights
    assert finite(saved) and saved["skipped"] == 9


def test_any_number_of_bad_gradients_that_are_not_in_a_row_are_skipped(
        tmp_path, little, monkeypatch):
    honest, calls = train.diffusion_loss, []

    def spoiled(*args, **options):
        calls.append(0)
        return honest(*args, **options) * (math.nan if len(calls) % 2 else 1)
    monkeypatch.setattr(train, "diffusion_loss", spoiled)
    saved = run_train(tmp_path, *"--res 16 --steps 24 --set blocks_16=1".split())
    assert saved["step"] == 24 and saved["skipped"] == 12


def test_weights_that_are_not_finite_are_never_saved(tmp_path, little, monkeypatch, capsys):
    honest = torch._foreach_lerp_

    def spoil(averages, weights, share):
        honest(averages, weights, share)
        if share < .85:                                     # from the fourth step on
            weights[0].data[0] = float("inf")
    monkeypatch.setattr(torch, "_foreach_lerp_", spoil)
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path, "--steps", "6", "--save-every", "1")
    steps = sorted(tmp_path.glob("ckpt-*.pt"))
    assert stop.value.code == 1
    assert f"the last good checkpoint is {steps[-1]}" in capsys.readouterr().err
    for file in [*steps, tmp_path / "model.pt"]:
        saved = checkpoint.read(file)
        assert all(torch.isfinite(weights).all() for weights in
                   [*saved.get("model", {}).values(), *saved["ema"].values()])


# ---------------------------------------------------------------------------- log and reports

def test_losses_by_noise_level_are_those_of_the_first_16_pictures_by_hand(
        tmp_path, little, monkeypatch):
    """At the start v_hat = 0, so that eps_hat = sigma z."""
    monkeypatch.setattr(run, "REPORT_STEPS", 1)
    run_train(tmp_path, *"--steps 1 --lr 1e-30 --sample-every 1 --schedule cosine".split())
    (line,) = log_lines(tmp_path, "loss_by_noise_level")
    x = torch.stack([flowers.Flowers(32)[n][0] for n in range(16)]) / 127.5 - 1
    _, eps, _ = noise.draw_noise(1, range(16), 32, "cpu")           # of the next seed
    clipped = math.atan(math.exp(-15 / 2))
    for level in range(8):
        angle = clipped + (level + .5) / 8 * (math.pi / 2 - 2 * clipped)
        z = math.cos(angle) * x + math.sin(angle) * eps
        by_hand = (eps - math.sin(angle) * z).square().mean().item()
        assert math.isclose(line["loss_by_noise_level"][level], by_hand, rel_tol=1e-4)


def test_seconds_in_the_log_are_those_of_the_whole_run(tmp_path, little):
    run_train(tmp_path, "--steps", "1")
    file = tmp_path / "ckpt-00000001.pt"
    torch.save(checkpoint.read(file) | dict(seconds=1000.5), file)
    run_train(tmp_path, "--steps", "2")
    assert 1000.5 <= log_lines(tmp_path)[-1]["seconds"] < 1100


# ---------------------------------------------------------------------------- broken pictures

def test_seconds_of_short_lines_add_up(tmp_path, little, monkeypatch):
    times = itertools.count(step=.04)       # two looks at the clock a line: .04 s each
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(times))
    run_train(tmp_path, "--steps", "5", "--log-every", "1")
    assert log_lines(tmp_path)[-1]["seconds"] == .2


def test_a_broken_picture_that_a_full_disk_kept_out_of_the_list_enters_it_later(tmp_path, capsys):
    one = SimpleNamespace(dataset=SimpleNamespace(unread={}), broken={"a.png": "why"}, named=set(),
                          out=tmp_path / "later")
    with pytest.raises(OSError):
        run.Run.name_broken(one)
    one.out.mkdir()
    for _ in range(2):
        run.Run.name_broken(one)
    assert (one.out / "broken.txt").read_text() == "a.png\twhy\n"
    assert capsys.readouterr().out.count("skipped a.png: why") == 1


def test_corrupt_file_is_named_once_in_training(tmp_path, little, capsys):
    """Over several epochs, after a resume, and by loaders: one line, and a count at the end."""
    write_folder(tmp_path / "set", 8)
    (tmp_path / "set/a/bad.png").write_bytes(b"this is not a picture")
    for steps, workers in (("4", "0"), ("6", "0"), ("9", "2")):
        run_train(tmp_path / "run", "--data", tmp_path / "set", "--steps", steps, "--set",
                  f"workers={workers}")
    printed = "".join(capsys.readouterr())
    assert printed.count("skipped a/bad.png: UnidentifiedImageError") == 1
    assert printed.count("1 of 9 pictures could not be read and were skipped: "
                         f"{tmp_path}/run/broken.txt") == 3
    assert (tmp_path / "run/broken.txt").read_text().count("\n") == 1


def test_a_run_with_just_half_of_its_pictures_broken_goes_on(tmp_path, little, capsys):
    write_folder(tmp_path / "set", 8)
    for i in range(4):
        (tmp_path / f"set/a/{2 * i}.png").write_bytes(b"no picture")
    run_train(tmp_path / "run", "--data", tmp_path / "set", "--steps", "2")
    assert "4 of 8 pictures could not be read and were skipped" in capsys.readouterr().out


@pytest.mark.parametrize("workers", "02")
def test_more_than_half_broken_stops_the_run(tmp_path, little, capsys, workers):
    """108 of 200, none of the first 32 pictures: found out on the way, and nothing is saved."""
    write_folder(tmp_path / "set", 200, (16, 16))
    order = np.random.default_rng((1, 0, 0)).permutation(200)
    names = data.Pictures(tmp_path / "set", 16).names
    for i in order[32:140]:
        (tmp_path / "set" / names[i]).write_bytes(b"no picture")
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "run", "--data", tmp_path / "set", "--res", "16", "--steps", "30",
                  "--set", f"workers={workers}")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert re.search(r"more than half cannot be read, 1\d\d of 200 so far; .*: Unid", error), error
    assert not list((tmp_path / "run").glob("ckpt-*.pt"))


def test_the_rate_rises_and_falls_to_zero_as_set(tmp_path, little):
    run_train(tmp_path, *"--steps 8 --lr 1 --log-every 1 --set warmup=2 decay=.5 clip=1e-9".split())
    assert [line["lr"] for line in log_lines(tmp_path)] == [.5, 1, 1, 1, 1, .75, .5, .25]
