"""Checkpoints: whole or not at all, and never trusted."""
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch

import config as config_module
import checkpoint
import sample as sampling
import text
import train
import unet
import uvit
from sid2 import ResidualUViT
from tests.helpers import (HERE, LITTLE, SMALL, assert_same_bits, condition, full_disk, one_line,
                           run_train)

# ---------------------------------------------------------------------------- whole files


def interrupt(file):
    file.write(b"ne")
    raise KeyboardInterrupt     # raised, not sent: a job in the background ignores Ctrl-C


@pytest.mark.parametrize("of_the_disk", [True, False])
def test_words_of_the_disk_are_raised_also_if_torch_save_hides_them(tmp_path, of_the_disk):
    def write_to(file):
        try:
            raise OSError(28, "No space left on device") if of_the_disk else KeyError("weight")
        except (OSError, KeyError):
            raise RuntimeError("unexpected pos 64 vs 0")    # as torch.save does it
    expected, words = (OSError, "No space left") if of_the_disk else (RuntimeError, "unexpected")
    with pytest.raises(expected, match=words):
        checkpoint.write(tmp_path / "model.pt", write_to)
    assert not list(tmp_path.iterdir())


def test_write_replaces_in_one_step_or_not_at_all(tmp_path):
    file = tmp_path / "file"
    checkpoint.write(file, lambda part: part.write(b"old"))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        checkpoint.write(file, lambda part: torch.save(torch.zeros(100_000), part))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(file, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and file.read_bytes() == b"old"
    during = []
    checkpoint.write(file, lambda part: part.write(b"new") and during.append(file.read_bytes()))
    assert during == [b"old"] and file.read_bytes() == b"new"
    with pytest.raises(OSError):
        checkpoint.write(tmp_path / "nowhere" / "file", lambda part: None)


def test_log_has_whole_lines_only(tmp_path):
    file = tmp_path / "log"
    with checkpoint.lock(file) as log:
        for step in (1, 2, 3):
            checkpoint.append(log, json.dumps(dict(step=step)))
        whole = file.read_bytes()
        with full_disk(50), pytest.raises(OSError):
            checkpoint.append(log, json.dumps(dict(step=4, more="x" * 60)))
        assert file.read_bytes() == whole
        for torn in (b'{"step": 3', b'{"step": 3}', b"{}\n", b"\0\0\n", b'{"step": 9}\n'):
            log.write(torn)
            checkpoint.trim(log, 3)
            assert file.read_bytes() == whole
        checkpoint.trim(log, 1)
        assert file.read_bytes() == b'{"step": 1}\n'
        with pytest.raises(BlockingIOError):
            checkpoint.lock(file, patience=0)


# ---------------------------------------------------------------------------- bad files

class Program:
    """What a hostile file holds: code that runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def each_weight(saved, change):
    """The same file with change(weight) for each weight of the model and the EMA."""
    return saved | {part: {name: change(weight) for name, weight in saved[part].items()}
                    for part in ("model", "ema") if part in saved}


# What is changed in the dict of a file, and what the line about it says.
CHANGED = {
    "program": (lambda saved: saved | dict(extra=Program()),
                "refused, for it holds more than tensors"),
    "newer format": (lambda saved: saved | dict(format=checkpoint.FORMAT + 1),
                     f"format {checkpoint.FORMAT + 1} is of a newer version of this code"),
    "no format": (lambda saved: {key: saved[key] for key in saved if key != "format"},
                  "names no format"),
    "no network": (lambda saved: {key: saved[key] for key in saved if key != "network"},
                   "network is missing or wrong"),
    "step of another kind": (lambda saved: saved | dict(step="2"), "step is missing or wrong"),
    "bare weights": (lambda saved: saved["ema"], "names no format"),
    "other weights": (lambda saved: each_weight(saved, lambda weight: weight[..., :1]), "network"),
    "not finite": (lambda saved: each_weight(saved, lambda weight: weight * float("nan")),
                   "network"),
    "other network": (lambda saved: saved | dict(network=saved["network"] | dict(depth=3)),
                      "network"),
    "absurd network": (lambda saved: saved | dict(network=saved["network"] | dict(res=10**9)),
                       "network"),
    "network of a later version": (
        lambda saved: saved | dict(network=saved["network"] | dict(experts=7)), "network"),
    "absurd settings": (lambda saved: saved | dict(config=saved["config"] | dict(res=10**9)),
                        "(network|--res 1000000000, now 32)"),
    "settings of no model": (lambda saved: saved | dict(format=2, config=saved["config"] | dict(
        model="huge", multiscale="off", bf16="off", compile="off")), "not a checkpoint of ours")}
DAMAGED = {     # done to the bytes of a file
    "truncated": (lambda raw: raw[:len(raw) // 2], "cut short"),
    "empty": (lambda raw: b"", "cut short"),
    **{f"bit {at}": (lambda raw, at=int(at * 1000): raw[:len(raw) * at // 1000] + bytes(
        [raw[len(raw) * at // 1000] ^ 64]) + raw[len(raw) * at // 1000 + 1:], "damaged")
       for at in (.1, .5, .9)},     # in the weights, where torch.load would not notice
    "program, bare pickle": (lambda raw: pickle.dumps(Program()), "not a checkpoint"),
    "compressed": (lambda raw: repacked(raw, zipfile.ZIP_DEFLATED), "damaged")}
CHANGED_RUN = {         # of no importance to sample.py
    "other settings": (lambda saved: saved | dict(config=saved["config"] | dict(model="base")),
                       "--model base, now laptop"),
    "settings of a later version": (
        lambda saved: saved | dict(config={**saved["config"], "experts": 7}),
        "was started with --set experts=7, now the default"),
    # A wrong shape would be written beyond its end.
    "other optimizer": (lambda saved: saved["optimizer"]["state"][0].update(
        exp_avg=torch.zeros(1)) or saved, "network")}


def repacked(raw, how):
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(packed, "w", how) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return packed.getvalue()


@pytest.mark.parametrize("kind", [*CHANGED, *DAMAGED, "program, old torch.save", *CHANGED_RUN])
def test_bad_checkpoint_is_one_line_and_left_alone(
        tmp_path, little, trained_run, capsys, monkeypatch, kind):
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    run, model = tmp_path / "run", tmp_path / "model.pt"
    shutil.copytree(trained_run, run)
    shutil.copy(run / "model.pt", model)
    newest = sorted(run.glob("ckpt-*.pt"))[-1]
    for file in [newest] + [model] * (kind not in CHANGED_RUN):
        if kind in DAMAGED:
            change, words = DAMAGED[kind]
            file.write_bytes(change(file.read_bytes()))
        elif kind in CHANGED | CHANGED_RUN:
            change, words = (CHANGED | CHANGED_RUN)[kind]
            torch.save(change(checkpoint.read(file)), file)
        else:
            words = "not a checkpoint"
            torch.save(dict(extra=Program()), file, _use_new_zipfile_serialization=False)
    before = {file: file.read_bytes() for file in [*run.iterdir(), model]}
    error = one_line(capsys, train.main, [*SMALL, "--out", run, "--steps", "3"])
    assert re.search(words, error) and str(run) in error, error
    if kind not in CHANGED_RUN:
        error = one_line(capsys, sampling.main, ["--ckpt", model, "--n", "1", "--steps", "1",
                                                 "--out", tmp_path / "no"])
        assert re.search(words, error) and error.startswith(f"--ckpt {model}: "), error
    assert {file: file.read_bytes() for file in [*run.iterdir(), model]} == before
    assert not (tmp_path / "trap").exists() and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name, value", [("res", 64), ("portrait", True), ("text", "bytes")])
def test_settings_that_are_not_those_of_the_network_are_refused(
        tmp_path, trained_run, capsys, name, value):
    """Size of the noise, orientation and captions that sample.py goes by."""
    saved = checkpoint.read(trained_run / "model.pt")
    saved["config"][name] = value
    torch.save(saved, tmp_path / "model.pt")
    error = one_line(capsys, sampling.main, ["--ckpt", tmp_path / "model.pt", "--n", "1",
                                             "--steps", "1", "--out", tmp_path / "no"])
    assert "its weights are not those of the network it describes" in error


@pytest.mark.parametrize("name, value", [("depth", 1001), ("blocks", (1, 1, 1001))])
def test_endless_blocks_are_refused(name, value):
    with torch.device("meta"), pytest.raises(ValueError, match="more than 1,000 blocks"):
        checkpoint.build_network(res=16, **TINY | {"classes": 1, name: value})


def test_a_file_that_asks_for_endless_blocks_is_refused_at_once(tmp_path, trained_run, capsys):
    saved, start = checkpoint.read(trained_run / "model.pt"), time.time()
    saved["network"]["depth"] = 10**9
    torch.save(saved, tmp_path / "model.pt")
    error = one_line(capsys, sampling.main, ["--ckpt", tmp_path / "model.pt", "--n", "1"])
    assert "its weights are not those of the network it describes" in error
    assert time.time() - start < 60


def test_classes_that_are_not_those_of_the_network_are_refused(tmp_path, trained_run, capsys):
    saved = checkpoint.read(trained_run / "model.pt")
    saved["classes"] += ["13 petals"]
    torch.save(saved, tmp_path / "model.pt")
    error = one_line(capsys, sampling.main, ["--ckpt", tmp_path / "model.pt", "--label", "10",
                                             "--n", "1", "--out", tmp_path / "no"])
    assert "its weights are not those of the network it describes" in error


def test_damaged_newest_checkpoint_names_the_one_before(tmp_path, little, capsys):
    run_train(tmp_path, "--steps", "2", "--save-every", "1")
    (tmp_path / "ckpt-00000002.pt").write_bytes(b"torn")
    error = one_line(capsys, train.main, [*SMALL, "--out", tmp_path, "--steps", "2"])
    assert f"without that file the run goes on from {tmp_path}/ckpt-00000001.pt" in error
    (tmp_path / "ckpt-00000002.pt").unlink()
    assert run_train(tmp_path, "--steps", "2")["step"] == 2


def test_only_files_of_the_run_are_read_or_removed(tmp_path, little, capsys):
    run_train(tmp_path / "run", "--steps", "2", "--save-every", "1")
    for name in ("ckpt-best.pt", "ckpt-last.pt", "film.iso.part"):
        (tmp_path / "run" / name).write_bytes(b"the user's")
    train.main([*SMALL, "--out", str(tmp_path / "run"), "--steps", "4", "--save-every", "1"])
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == \
        ["ckpt-00000003.pt", "ckpt-00000004.pt", "ckpt-best.pt", "ckpt-last.pt", "film.iso.part",
         "index.html", "log.jsonl", "model.pt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.jsonl").write_text("my diary\n")
    error = one_line(capsys, train.main, [*SMALL, "--out", tmp_path / "other"])
    assert "its log.jsonl is not of a run" in error
    assert (tmp_path / "other/log.jsonl").read_text() == "my diary\n"


# ---------------------------------------------------------------------------- its own network

def test_a_run_and_its_model_keep_their_network_when_the_preset_of_their_name_changes(
        tmp_path, little, monkeypatch):
    draw = lambda out: sampling.main(["--ckpt", str(tmp_path / "run/model.pt"), "--n", "2",
                                      "--steps", "3", "--out", str(tmp_path / out)])
    whole = run_train(tmp_path / "whole", "--steps", "4")
    run_train(tmp_path / "run", "--steps", "2")
    draw("before")
    monkeypatch.setitem(uvit.PRESETS["laptop"], "network",
                        LITTLE | dict(widths=(32, 32, 32, 64), depth=3, emb_dim=64, dropout=.5,
                                      position_init="sines"))
    draw("after")
    assert (tmp_path / "before/grid.png").read_bytes() == (tmp_path / "after/grid.png").read_bytes()
    resumed = run_train(tmp_path / "run", "--steps", "4")
    for part in ("network", "model", "ema", "optimizer"):
        assert_same_bits(whole[part], resumed[part])
    new = run_train(tmp_path / "new", "--steps", "1")
    assert new["network"]["depth"] == 3 and new["model"]["position"].shape[1] == 64


LITTLE_DEEP, CAPTIONS = LITTLE | dict(depth=3, dropout=.2), text.ByteEncoder(9, 16)


@pytest.mark.parametrize("flags, wanted", [
    ("", lambda: uvit.UViT(32, **LITTLE, classes=3)),
    ("--res 16x32 --portrait --text bytes --set text_length=9 blocks_16=3 dropout=.2",
     lambda: uvit.UViT("16x32", **LITTLE_DEEP, classes=3, portrait=True, text=CAPTIONS)),
    ("--set skips=level dropout_res=32 dropout=.2 blocks_16=3",
     lambda: ResidualUViT(32, **LITTLE_DEEP, classes=3, dropout_res=32)),
    ("--res 64 --set largest_map=32 patch=conv",
     lambda: uvit.UViT(64, **LITTLE, classes=3, largest_map=32, patch="conv")),
    ("--res 256", lambda: uvit.UViT(256, **LITTLE, classes=3)),
    ("--set architecture=unet blocks_16=2",
     lambda: unet.UNet(32, 16, 32, 32, 0.0, classes=3, blocks_16=2))])
def test_the_numbers_in_a_file_build_the_network_that_the_command_line_named(
        little, monkeypatch, flags, wanted):
    """Only they: neither the settings nor a preset is needed."""
    numbers = train.parse_config(["--res", "32", *flags.split()]).network_settings(classes=3)
    numbers = json.loads(json.dumps(numbers))           # plain values
    monkeypatch.setattr(uvit, "PRESETS", {})
    model, wanted = checkpoint.build_network(**numbers), wanted()
    assert type(model) is type(wanted) and repr(model) == repr(wanted)      # kinds, sizes, dropout
    assert model.wavelet_levels == wanted.wavelet_levels
    assert {name: p.shape for name, p in model.state_dict().items()} == \
        {name: p.shape for name, p in wanted.state_dict().items()}


# ---------------------------------------------------------------------------- older files

# As format 2 wrote them: a name in place of the network's numbers, 0, -1 and "" where there is None
# now, and "on" and "off". The run of `SMALL` with `--steps 2`, and no preset of that time.
OLD_SETTINGS = dict(
    data="", res=32, portrait=False, flip=True, text="", text_length=128, model="tiny", net="uvit",
    blocks_16=0, skips="block", patch="dwt", dropout=-1, dropout_res=16, init="",
    schedule="shifted", noise_d=32, loss="eps", bias=None, multiscale="off", drop_label=.1,
    batch=8, accum=1, steps=2, lr=2e-3, warmup=100, clip=1.0, ema=.9999, seed=0, out="",
    compile="off", bf16="off", memory_budget=-1, recompute=False, shard=False, workers=-1,
    timeout=30.0, log_every=1, sample_every=0, save_every=1000)
TINY = dict(widths=(16, 16, 48, 128), blocks=(1, 1, 1), depth=4, head_dim=64, emb_dim=256)
FLOWERS = [f"{petals} petals" for petals in range(3, 13)]


def old_names(state):
    return {name.replace("upsample.", "unpool."): weights for name, weights in state.items()}


@torch.no_grad()
@pytest.mark.parametrize("settings, classes, make", [
    ({}, FLOWERS, lambda: uvit.UViT(32, **TINY, classes=10)),
    (dict(text="bytes", text_length=9, portrait=True, res="16x32", blocks_16=2), [],
     lambda: uvit.UViT("16x32", **TINY | dict(depth=2), portrait=True,
                       text=text.ByteEncoder(9, 128))),
    (dict(skips="level", res=160, dropout=.3), FLOWERS[:2],
     lambda: ResidualUViT(160, **TINY, classes=2, dropout=.3)),
    (dict(model="mini", patch="conv", res=160), [],
     lambda: uvit.UViT(160, (32, 64, 96, 192), (1, 1, 2), 8, 64, 192, patch="conv")),
    (dict(net="unet", blocks_16=1), FLOWERS,
     lambda: unet.UNet(32, 16, 64, 256, dropout=0.0, classes=10, blocks_16=1))],
    ids=["tiny", "captions", "SiD2", "mini", "unet"])
def test_files_of_format_2_load(tmp_path, settings, classes, make):
    torch.manual_seed(1)
    model = make().eval()
    for weights in model.parameters():          # also those that begin at zero
        weights += .02 * torch.randn_like(weights)
    assert any(name.startswith("unpool.") for name in old_names(model.state_dict())) \
        or settings["res"] == "16x32"
    torch.save(dict(format=2, config=OLD_SETTINGS | settings, classes=classes, step=2,
                    ema=old_names(model.state_dict())), tmp_path / "model.pt")
    loaded, saved = checkpoint.load_model(tmp_path / "model.pt", "cpu")
    assert type(loaded) is type(model) and saved["step"] == 2 and saved["classes"] == classes
    assert_same_bits(dict(model.state_dict()), dict(loaded.state_dict()))
    assert [part.p for part in model.modules() if isinstance(part, torch.nn.Dropout)] == \
        [part.p for part in loaded.modules() if isinstance(part, torch.nn.Dropout)]
    H, W = checkpoint.height_width(saved["config"]["res"])
    z, logsnr = torch.randn(2, 3, H, W), torch.tensor([-3., 2.])
    cond = condition([1, -1], [1, 0], [[3] * 9, [0] * 9] if settings.get("text") else None)
    v_hat = loaded(z, logsnr, cond)
    assert v_hat.std() > 1e-3 and torch.equal(v_hat, model(z, logsnr, cond))
    assert saved["format"] == checkpoint.FORMAT     # and once more, in the format of today
    torch.save(saved, tmp_path / "new.pt")
    again, _ = checkpoint.load_model(tmp_path / "new.pt", "cpu")
    assert torch.equal(v_hat, again(z, logsnr, cond))


NEW_SETTINGS = {"largest_map", "coarsest", "follow_links", "save_minutes", "tensorboard"}


def test_settings_of_format_2_mean_the_same_in_todays_words(tmp_path):
    weights = old_names(uvit.UViT(32, **TINY, classes=10).state_dict())

    def config(**settings):
        torch.save(dict(format=2, config=OLD_SETTINGS | settings, classes=FLOWERS, step=2,
                        ema=weights), tmp_path / "model.pt")
        return checkpoint.read(tmp_path / "model.pt")["config"]
    old = config()
    now = vars(train.parse_config(["--model", "tiny", "--res", "32", "--batch", "8", "--accum", "1",
                                   "--steps", "2", "--compile", "off", "--log-every", "1",
                                   "--sample-every", "0", "--save-every", "1000", "--set",
                                   "bf16=off"]))
    assert now | old | dict(out="") == now | dict(out="")
    assert now.keys() - old.keys() == NEW_SETTINGS
    other = config(blocks_16=3, dropout=0.0, accum=0, workers=0, multiscale="on", compile="",
                   bf16="on")
    assert [other[name] for name in ("blocks_16", "dropout", "accum", "workers", "multiscale",
                                     "compile", "bf16")] == [3, 0.0, None, 0, True, None, True]
    paper = checkpoint.upgraded(dict(format=2, classes=[], ema={}, config=OLD_SETTINGS | dict(
        model="paper", net="unet")))["network"]
    assert (paper["channels"], paper["blocks_16"], paper["dropout"]) == (128, 12, .1)


@pytest.mark.parametrize("name, millions, dropout, head_dim", [
    ("small", 48.5, .1, 64), ("base", 360.5, .1, 64), ("paper", 2455.7, .2, 128)])
def test_old_names_of_models_mean_the_networks_of_the_table(name, millions, dropout, head_dim):
    """Its weights are at 256 x 256 with 1,000 classes."""
    network = checkpoint.upgraded(dict(format=2, classes=[""] * 1000, ema={}, config=OLD_SETTINGS |
                                       dict(model=name, res=256)))["network"]
    with torch.device("meta"):
        model = checkpoint.build_network(**network)
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < .06
    assert model.transformer[0][0].dropout.p == dropout
    assert model.transformer[0][1].head_dim == head_dim


def test_a_run_of_format_2_goes_on(tmp_path):
    whole = run_train(tmp_path / "whole", "--model", "tiny", "--steps", "4")
    saved = run_train(tmp_path / "run", "--model", "tiny", "--steps", "2")
    file = sorted((tmp_path / "run").glob("ckpt-*.pt"))[-1]
    assert saved.pop("network") and saved["config"].keys() == \
        OLD_SETTINGS.keys() - {"memory_budget", "net"} | NEW_SETTINGS | {"architecture",
                                                                         "optimizer", "decay"}
    old = saved | dict(format=2, config=OLD_SETTINGS | dict(out=str(tmp_path / "run")),
                       model=old_names(saved["model"]), ema=old_names(saved["ema"]))
    assert old["model"].keys() != saved["model"].keys()
    torch.save(old, file)
    resumed = run_train(tmp_path / "run", "--model", "tiny", "--steps", "4")
    for part in ("step", "classes", "model", "ema", "optimizer"):
        assert_same_bits(whole[part], resumed[part])
    assert resumed["format"] == checkpoint.FORMAT and resumed["network"]["depth"] == 4


def test_a_run_of_format_2_with_other_settings_is_refused(tmp_path, capsys):
    saved = run_train(tmp_path, "--model", "tiny", "--steps", "1")
    for name, value, words in (("noise_d", 64, "--set noise_d=64, now 32"),
                               ("dropout", .1, "--set dropout=0.1, now the default"),
                               ("multiscale", "on", "--set multiscale=on, now off"),
                               ("text", "bytes", "--text bytes, now "),
                               ("model", "mini", "--model mini, now tiny")):
        old = saved | dict(format=2, config=OLD_SETTINGS | {name: value})
        torch.save(old, tmp_path / "ckpt-00000001.pt")
        error = one_line(capsys, train.main, [*SMALL, "--model", "tiny", "--steps", "2",
                                               "--out", tmp_path])
        assert words in error, error


def test_a_checkpoint_from_before_there_were_captions_still_loads(tmp_path):
    """Of format 1: without the settings that came later."""
    later = "net blocks_16 skips text text_length portrait init bias".split()
    settings = {name: value for name, value in OLD_SETTINGS.items() if name not in later}
    weights = old_names(uvit.UViT(32, **TINY, classes=10).state_dict())
    torch.save(dict(format=1, config=settings, classes=FLOWERS, step=2, ema=weights),
               tmp_path / "old.pt")
    model, again = checkpoint.load_model(tmp_path / "old.pt", "cpu")
    assert type(model) is uvit.UViT
    names = [name for name in later if name != "net"] + ["architecture"]    # as it is called now
    assert all(again["config"][name] == vars(config_module.Config())[name] for name in names)


@torch.no_grad()
@pytest.mark.parametrize("name, res, cond, mean, std, corner, middle", [
    ("flowers", 128, condition([2]), -.0064864, .828970,
     (.692049, -.208365, .479034), (.517013, 1.090885, .907853)),
    ("flowers", 128, None, -.0063388, .829468, None, (.488254, 1.067933, .863479)),
    ("photos", 64, condition([2]), .0299077, .635499,
     (1.039618, .390893, .151864), (.608409, .241430, .630188)),
    ("photos", 64, None, .0218169, .634045, None, (.617877, .245457, .553304)),
    ("words", 40, condition(tokens=[text.byte_tokens("a red flower", 64)]), .0659893, .747314,
     (1.098320, .407215, .244871), (-.367021, -.377516, .891464)),
    ("words", 40, None, .0335215, .734376, None, (-.344250, -.563251, .888210))],
    ids=["flowers, 5 petals", "flowers, no class", "photos, roses", "photos, no class",
         "words, a red flower", "words, no caption"])
def test_bundled_weights_give_the_v_hat_that_they_gave_when_they_were_trained(
        name, res, cond, mean, std, corner, middle):
    """At logsnr = 0, of noise; the numbers are of the code that wrote these files."""
    file = HERE / "assets" / f"{name}.pt"
    model, _ = checkpoint.load_model(file, "cpu")
    # Adam's state in a checkpoint goes by the order of the weights, which has to stay the same.
    written = torch.load(file, weights_only=True)["ema"]
    assert list(old_names(written)) == list(old_names(model.state_dict()))
    z = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, res, res), np.float32))
    v_hat = model(z, torch.zeros(1), cond)
    assert v_hat.shape == z.shape
    assert np.allclose([v_hat.mean(), v_hat.std()], [mean, std], rtol=0, atol=1e-5)
    assert np.allclose(v_hat[0, :, res // 2, res // 2], middle, rtol=0, atol=1e-4)
    assert corner is None or np.allclose(v_hat[0, :, 0, 0], corner, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------- release

def test_a_release_is_half_as_large_holds_the_same_weights_and_names_no_folder(
        tmp_path, trained_run):
    checkpoint.release(trained_run / "model.pt", tmp_path / "small.pt")
    (model, whole), (small, saved) = (checkpoint.load_model(path, "cpu") for path in
                                      (trained_run / "model.pt", tmp_path / "small.pt"))
    assert saved["config"] == whole["config"] | dict(data="", out="", init="")
    assert whole["config"]["out"] and saved["classes"] == whole["classes"]
    assert saved["network"] == whole["network"]
    size = [path.stat().st_size for path in (tmp_path / "small.pt", trained_run / "model.pt")]
    assert size[0] < .55 * size[1]
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weights, rtol=2**-8, atol=0)
    checkpoint.release(max(trained_run.glob("ckpt-*.pt")), tmp_path / "from.pt")
    # Without the optimizer.
    assert set(torch.load(tmp_path / "from.pt", weights_only=True)) == set(checkpoint.KEYS)


@pytest.mark.parametrize("arguments, words", [
    ([], "usage"), (["gone.pt", "out.pt"], "No such file"),
    ([__file__, "out.pt"], "not a checkpoint")], ids=["none", "gone", "no checkpoint"])
def test_wrong_release_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    done = subprocess.run([sys.executable, HERE / "checkpoint.py", *arguments], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_reading_the_bundled_weights_does_not_load_torchs_compiler():
    """It would take longer than the rest of the start."""
    code = ("import sys\nfrom pathlib import Path\nfrom checkpoint import load_model\n"
            "for path in Path('assets').glob('*.pt'):\n"
            "    assert not any(p.is_meta for p in load_model(path, 'cpu')[0].parameters())\n"
            "sys.exit('torch._dynamo' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE).returncode == 0
