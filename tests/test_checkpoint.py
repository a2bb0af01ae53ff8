"""Checkpoints: whole or not at all, and never trusted."""
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

import checkpoint
import sample as sampling
import train
import uvit
from helpers import full_disk
from test_all import HERE, SMALL, one_line, run_train


def interrupt(file):
    file.write(b"ne")
    raise KeyboardInterrupt                 # raised, not sent: a job in the background ignores Ctrl-C


def test_write_replaces_in_one_step_or_not_at_all(tmp_path):
    checkpoint.write(tmp_path / "file", lambda file: file.write(b"old"))
    with full_disk(), pytest.raises(OSError, match="File too large"):
        checkpoint.write(tmp_path / "file", lambda file: torch.save(torch.zeros(100_000), file))
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write(tmp_path / "file", interrupt)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_bytes() == b"old"
    seen = []
    checkpoint.write(tmp_path / "file", lambda file: file.write(b"new") and seen.append((tmp_path / "file").read_bytes()))
    assert seen == [b"old"] and (tmp_path / "file").read_bytes() == b"new"
    with pytest.raises(OSError):
        checkpoint.write(tmp_path / "nowhere" / "file", lambda file: None)


def test_log_has_whole_lines_only(tmp_path):
    with checkpoint.lock(tmp_path / "log") as log:
        for step in (1, 2, 3):
            checkpoint.append(log, json.dumps(dict(step=step)))
        whole = (tmp_path / "log").read_bytes()
        with full_disk(50), pytest.raises(OSError):
            checkpoint.append(log, json.dumps(dict(step=4, more="x" * 60)))
        assert (tmp_path / "log").read_bytes() == whole
        for torn in (b'{"step": 3', b'{"step": 3}', b"{}\n", b"\0\0\n", b'{"step": 9}\n'):
            log.write(torn)
            checkpoint.trim(log, 3)
            assert (tmp_path / "log").read_bytes() == whole
        checkpoint.trim(log, 1)
        assert (tmp_path / "log").read_bytes() == b'{"step": 1}\n'
        with pytest.raises(BlockingIOError):
            checkpoint.lock(tmp_path / "log", patience=0)


class Program:
    """What a hostile file holds: code that runs when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (os.environ["TRAP"],)


def damage(kind, file, saved):
    """Make file a bad copy of what it was."""
    raw = file.read_bytes()
    if kind == "program":
        torch.save(saved | dict(extra=Program()), file)
    elif kind == "program, bare pickle":
        file.write_bytes(pickle.dumps(Program()))
    elif kind == "program, old torch.save":
        torch.save(saved | dict(extra=Program()), file, _use_new_zipfile_serialization=False)
    elif kind == "truncated":
        file.write_bytes(raw[:len(raw) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind.startswith("bit"):                        # in the weights, where torch.load would not notice
        at = int(len(raw) * float(kind.split()[1]))
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 64]) + raw[at + 1:])
    elif kind == "newer format":
        torch.save(saved | dict(format=3), file)
    elif kind == "no format":
        torch.save({key: value for key, value in saved.items() if key != "format"}, file)
    elif kind == "bare weights":
        torch.save(saved["ema"], file)
    elif kind == "other architecture":
        torch.save(saved | {part: {name: weight[..., :1] for name, weight in saved[part].items()} for part in ("model", "ema") if part in saved}, file)
    elif kind == "other configuration":
        torch.save(saved | dict(config=saved["config"] | dict(model="base")), file)
    elif kind == "absurd configuration":
        torch.save(saved | dict(config=saved["config"] | dict(res=10**9)), file)
    elif kind == "configuration of a later version":
        torch.save(saved | dict(config={**saved["config"], "depth": 7}), file)
    elif kind == "other optimizer" and "optimizer" in saved:        # a wrong shape would be written past its end
        saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(1)
        torch.save(saved, file)
    elif kind == "not finite" or kind == "other optimizer":
        torch.save(saved | {part: {name: weight * float("nan") for name, weight in saved[part].items()} for part in ("model", "ema") if part in saved}, file)
    elif kind == "compressed":
        with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))


BAD = {"program": "refused, for it holds more than tensors", "program, bare pickle": "not a checkpoint",
       "program, old torch.save": "not a checkpoint", "truncated": "cut short", "empty": "cut short", "bit .1": "damaged", "bit .5": "damaged",
       "bit .9": "damaged", "newer format": "format 3 is of a newer version of this code", "no format": "names no format",
       "bare weights": "names no format", "other architecture": "network", "other configuration": "(network|--model base, now tiny)",
       "absurd configuration": "(network|--res 1000000000, now 32)", "compressed": "damaged", "other optimizer": "network",
       "not finite": "network"}


@pytest.mark.parametrize("kind", [*BAD, "configuration of a later version"])
def test_bad_checkpoint_is_one_line_and_left_alone(tmp_path, little, trained_run, capsys, monkeypatch, kind):
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    words = BAD.get(kind, "was started with --depth 7, now None")
    run, model = tmp_path / "run", tmp_path / "model.pt"
    shutil.copytree(trained_run, run)
    shutil.copy(run / "model.pt", model)
    newest = sorted(run.glob("ckpt-*.pt"))[-1]
    for file in (newest, model):
        damage(kind, file, checkpoint.read(file))
    before = {file: file.read_bytes() for file in [*run.iterdir(), model]}
    error = one_line(capsys, train.main, [*SMALL, "--out", run, "--steps", "3"])
    assert re.search(words, error) and str(run) in error, error
    if kind in BAD:                                     # what sample.py has no use for does not disturb it
        error = one_line(capsys, sampling.main, ["--ckpt", model, "--n", "1", "--steps", "1", "--out", tmp_path / "no"])
        assert re.search(words, error) and error.startswith(f"--ckpt {model}: "), error
    assert {file: file.read_bytes() for file in [*run.iterdir(), model]} == before
    assert not (tmp_path / "trap").exists() and not (tmp_path / "no").exists()


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
        ["ckpt-00000003.pt", "ckpt-00000004.pt", "ckpt-best.pt", "ckpt-last.pt", "film.iso.part", "log.jsonl", "model.pt"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.jsonl").write_text("my diary\n")
    error = one_line(capsys, train.main, [*SMALL, "--out", tmp_path / "other"])
    assert "its log.jsonl is not of a run" in error and (tmp_path / "other/log.jsonl").read_text() == "my diary\n"


def test_a_checkpoint_of_before_there_were_captions_still_loads(tmp_path, trained_run):
    saved = checkpoint.read(trained_run / "model.pt")
    new = "net blocks_16 skips text text_length portrait init bias".split()
    saved["config"] = {name: value for name, value in saved["config"].items() if name not in new}
    torch.save(saved, tmp_path / "old.pt")
    model, again = sampling.load_model(tmp_path / "old.pt", "cpu")
    assert isinstance(model, uvit.UViT) and all(again["config"][name] == vars(train.Config())[name] for name in new)


def test_a_release_is_half_as_large_holds_the_same_weights_and_names_no_folder(tmp_path, trained_run):
    checkpoint.release(trained_run / "model.pt", tmp_path / "small.pt")
    (model, whole), (small, saved) = (sampling.load_model(path, "cpu") for path in (trained_run / "model.pt", tmp_path / "small.pt"))
    assert saved["config"] == whole["config"] | dict(data="", out="", init="") and whole["config"]["out"] and saved["classes"] == whole["classes"]
    assert (tmp_path / "small.pt").stat().st_size < .55 * (trained_run / "model.pt").stat().st_size
    for name, weights in model.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], weights, rtol=2**-8, atol=0)
    checkpoint.release(max(trained_run.glob("ckpt-*.pt")), tmp_path / "from.pt")             # without the optimizer
    assert set(torch.load(tmp_path / "from.pt", weights_only=True)) == set(checkpoint.KEYS)


@pytest.mark.parametrize("arguments, words", [([], "usage"), (["gone.pt", "out.pt"], "No such file"), ([__file__, "out.pt"], "not a checkpoint")])
def test_wrong_release_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    done = subprocess.run([sys.executable, HERE / "checkpoint.py", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
