"""Wrong commands: one line, exit code 2."""
import re
import shutil

import pytest
import torch

import checkpoint
import config
import sample as sampling
import train
from tests.helpers import HERE, SMALL, last_checkpoint, one_line, run_train, write_folder


def test_changed_settings_are_refused_with_the_difference_named(tmp_path, little, capsys):
    run_train(tmp_path, "--steps", "2")
    for flags, words in (("--lr .5", "--lr 0.002, now 0.5"),
                         ("--set blocks_16=3", "the default of blocks_16, now 3"),
                         ("--set multiscale=on", "--set multiscale=off, now on"),
                         ("--portrait --res 16x32", "--res 32, now 16x32"),
                         ("--no-flip", "--flip, now off")):
        error = one_line(capsys, train.main, [*SMALL, "--out", tmp_path, *flags.split()])
        assert error == f"{tmp_path} was started with {words}: go back to that, or give a new " \
            "--out\n"
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path, "--steps", "4", "--data", str(HERE / "assets"), "--batch", "1")
    assert stop.value.code == 2
    run_train(tmp_path, "--steps", "2")
    assert "done" in capsys.readouterr().out and last_checkpoint(tmp_path)["step"] == 2


def test_other_pictures_or_classes_are_refused(tmp_path, little, capsys):
    write_folder(tmp_path / "set")
    flags = ["--data", tmp_path / "set", "--steps"]
    run_train(tmp_path / "run", *flags, "1")
    command = [*SMALL, "--out", tmp_path / "run", *flags, "2"]
    more = tmp_path / "set/a/more.png"
    more.write_bytes((tmp_path / "set/a/0.png").read_bytes())
    error = one_line(capsys, train.main, command)
    assert error == f"{tmp_path}/run was started with 8 pictures in 2 classes, now 9 in 2: put " \
        "them back, or give a new --out\n"
    more.unlink()
    (tmp_path / "set/a").rename(tmp_path / "set/aa")     # in the same order
    assert "pictures or classes of other names" in one_line(capsys, train.main, command)
    (tmp_path / "set/aa").rename(tmp_path / "set/a")
    (tmp_path / "set/a/0.png").rename(tmp_path / "set/a/00.png")
    assert "pictures or classes of other names" in one_line(capsys, train.main, command)
    (tmp_path / "set/a/00.png").rename(tmp_path / "set/a/0.png")
    shutil.make_archive(tmp_path / "set", "zip", tmp_path, "set")       # a folder in the zip
    (tmp_path / "set").rename(tmp_path / "moved")
    flags[1] = tmp_path / "set.zip"
    assert run_train(tmp_path / "run", *flags, "2")["step"] == 2


@pytest.mark.parametrize("res, wrong, right", [(72, 16, 8), (144, 32, 16), (288, 64, 32)])
def test_a_size_too_odd_for_the_laptop_names_the_model_that_takes_it(res, wrong, right, capsys):
    error = one_line(capsys, train.main, ["--res", str(res), "--model", "laptop"])
    assert f"multiples of {wrong}, for example" in error
    assert error.endswith(f"; --model tiny takes multiples of {right}\n")
    assert config.parse_config(["--res", str(res), "--model", "tiny"]).res == res


WRONG = [       # flags of train.py, what the one line says: argument, value, what would be right
    ("--res 100", "--res 100: sides must be .*multiples of 8, for example 96$"),
    ("--res 0", "--res 0: must be pixels"),
    ("--res -64", "--res -64: must be pixels"),
    ("--res abc", "--res abc: must be pixels, like 64 or 384x640"),
    ("--res 8x", "--res 8x: must be pixels"),
    ("--res 64.5", "--res 64.5: must be pixels"),
    ("--res 8", "--res 8: .*for example 16$"),
    ("--res 1000000", "--res 1000000: must be pixels"),
    ("--res 8192", "--res 8192: .*for example 4096$"),
    ("--res", "--res expected one argument"),
    ("--res 360x640", "--res 360x640: sides must be from 16 to 4096 and, at this size, "
                      "multiples of 32, for example 352x640$"),
    ("--res 384x640x3", "--res 384x640x3: must be pixels"),
    ("--res 4x64", "--res 4x64: .*for example 16x64$"),
    ("--res 117x140", "--res 117x140: .*for example 128x144$"),
    ("--set architecture=unet --res 72", "--res 72: .*multiples of 16, for example 64$"),
    ("--res 136 --set largest_map=64", "--res 136: .*multiples of 16, for example 128$"),
    ("--portrait", "--portrait --res 32: needs a size wider than high"),
    ("--portrait --res 64x32", "--portrait --res 64x32: needs a size wider than high, "
                               "like 384x640"),
    ("--set architecture=gan", "--set architecture=gan: must be one of uvit, unet"),
    ("--set skips=none", "--set skips=none: must be one of block, level"),
    ("--set architecture=unet --text bytes",
     "--set architecture=unet: has no --text; architecture=uvit has"),
    ("--set architecture=unet skips=level",
     "--set architecture=unet: has no skips=level; architecture=uvit has"),
    ("--set architecture=unet largest_map=64",
     "--set architecture=unet: has no largest_map; architecture=uvit has"),
    ("--text words", "--text words: must be bytes, or t5:NAME"),
    ("--set text_length=0", "--set text_length=0: must be at least 1"),
    ("--text t5:{tmp}/nowhere", "t5:.*nowhere: (cannot be read|needs the package transformers)"),
    ("--text bytes --data {tmp}/few --batch 2", "--data .*few: no picture has a caption, a .txt "
                                                "beside it"),
    ("--set blocks_16=0", "--set blocks_16=0: must be at least 1"),
    ("--set largest_map=8", "--set largest_map=8: must be at least 16"),
    ("--reso 64", "--reso: no such argument, --res is one"),
    ("flowers", "flowers: no such argument, .* is one"),
    ("--set blocks=1", "--set blocks=1: must be NAME=VALUE, and NAME one of blocks_16"),
    ("--set dropout", "--set dropout: must be NAME=VALUE"),
    ("--set", "--set expected at least one argument"),
    ("--batch 99999999", "--batch 99999999: must be at most 1000000"),
    ("--model huge", "--model huge: must be one of laptop, tiny, mini, small, base, paper"),
    ("--set patch=haar", "--set patch=haar: must be one of dwt"),
    ("--schedule linear", "--schedule linear: must be one of cosine"),
    ("--loss l1", "--loss l1: must be one of eps"),
    ("--set coarsest=16", "--set coarsest=16: is for --set multiscale=on"),
    ("--schedule cosine --set noise_d=64", "--set noise_d=64: is for --schedule shifted"),
    ("--set text_length=64", "--set text_length=64: is for --text"),
    ("--set patch=none largest_map=64", "--set largest_map=64: is for patch=dwt"),
    ("--set multiscale=maybe", "--set multiscale=maybe: must be one of on, off"),
    ("--set bf16=yes", "--set bf16=yes: must be one of on, off"),
    ("--compile maybe", "--compile maybe: must be one of on, off"),
    ("--batch 9 --accum 2", "--batch 9: must be a multiple of 2"),
    ("--batch -8", "--batch -8: must be at least 1"),
    ("--batch 0", "--batch 0: must be at least 1"),
    ("--accum -1", "--accum -1: must be at least 1"),
    ("--steps 1e3", "--steps 1e3: must be a whole number"),
    ("--steps -1", "--steps -1: must be at least 1"),
    ("--lr -1", "--lr -1.0: must be at least 1e-30"),
    ("--lr nan", "--lr nan: must be a finite number"),
    ("--lr 1e999", "--lr 1e999: must be a finite number"),
    ("--set clip=0", "--set clip=0.0: must be at least"),
    ("--set ema=1", "--set ema=1.0: must be below 1"),
    ("--set dropout=1", "--set dropout=1.0: must be below 1"),
    ("--set dropout=-0.5", "--set dropout=-0.5: must be at least 0"),
    ("--set drop_label=1.5", "--set drop_label=1.5: must be below 1"),
    ("--set warmup=0", "--set warmup=0: must be at least 1"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--seed 99999999999999999999", "--seed 9+: must be at most"),
    ("--set workers=-2", "--set workers=-2: must be at least 0"),
    ("--save-every 0", "--save-every 0: must be at least 1"),
    ("--log-every 0", "--log-every 0: must be at least 1"),
    ("--set timeout=0", "--set timeout=0.0: must be at least 0.05"),
    ("--set noise_d=0", "--set noise_d=0: must be at least 1"),
    ("--shard --set optimizer=muon", "--shard: Muon needs whole matrices; --set optimizer=adam"),
    ("--shard", "--shard: divides the model among ranks, which torchrun starts"),
    ("--data {tmp}/nowhere", "--data .*nowhere: no such folder or .zip"),
    ("--data {tmp}/empty", "--data .*empty: no picture there .*png"),
    ("--data {tmp}/few --batch 16", "--data .*few: 8 pictures are fewer than --batch 16; add "
                                    "pictures or lower --batch"),
    ("--data {tmp}/broken --batch 2", "--data .*broken: more than half cannot be read, [23] of 3 "
                                      "so far; .*png: Unid"),
    ("--data {tmp}/bad.zip", "--data .*bad.zip: neither a folder nor a .zip that can be read"),
    ("--out {tmp}/nowhere/run", "--out .*run: the folder it is to be in does not exist; make that "
                                "first"),
    ("--out {tmp}/bad.zip", "--out .*bad.zip: cannot be written to .File exists"),
    ("--out /proc/run", "--out /proc/run: (cannot be written to|the folder it is to be in does "
                        "not exist)")]


@pytest.mark.parametrize("flags, words", WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, little, capsys, flags, words):
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "few")
    (tmp_path / "broken").mkdir()
    (tmp_path / "bad.zip").write_bytes(b"PK no zip")
    for i in range(3):
        (tmp_path / f"broken/{i}.png").write_bytes(b"no")
    error = one_line(capsys, train.main, [*SMALL, "--out", tmp_path / "run", "--steps", "1",
                                          *flags.format(tmp=tmp_path).split()])
    assert re.match(words, error), error
    assert not (tmp_path / "run").exists()


WRONG_SAMPLES = [
    ("--label rose", "--label rose: must be one of 0 to 9, or of 3 petals, 4 petals"),
    ("--label 10", "--label 10: must be one of 0 to 9"),
    ("--label ²", "--label ²: must be one of 0 to 9"),
    ("--gamma 2", "--gamma 2.0: must be at most 1"),
    ("--gamma .5", "--gamma 0.5: is for --sampler ancestral"),
    ("--schedule cosine", "--schedule cosine: is for --sampler ancestral or ddim"),
    ("--gamma -1", "--gamma -1.0: must be at least 0"),
    ("--gamma nan", "--gamma nan: must be a finite number"),
    ("--guidance -1", "--guidance -1.0: must be at least 0"),
    ("--guidance much", "--guidance much: must be a finite number"),
    ("--n 0", "--n 0: must be at least 1"),
    ("--n many", "--n many: must be a whole number"),
    ("--steps 0", "--steps 0: must be at least 1"),
    ("--batch 0", "--batch 0: must be at least 1"),
    ("--steps 9999999", "--steps 9999999: must be at most"),
    ("--n 999999999", "--n 999999999: must be at most"),
    ("--seed -1", "--seed -1: must be at least 0"),
    ("--sampler euler", "--sampler euler: must be one of sde, dpm, ancestral, ddim"),
    ("--samples 3", "--samples: no such argument, --sampler is one"),
    ("--ckpt {tmp}/nowhere.pt", "--ckpt .*nowhere.pt: No such file"),
    ("--ckpt {tmp}", "--ckpt .*: Is a directory"),
    ("--ckpt {tmp}/empty.pt", "--ckpt .*empty.pt: not a checkpoint, or cut short"),
    ("--ckpt {here}/LICENSE", "--ckpt .*LICENSE: not a checkpoint"),
    ("--out {tmp}/empty.pt", "--out .*empty.pt: cannot be used .*name another folder"),
    ("--out {tmp}/mine", "--out .*mine: holds other pictures .000007.png.: name another folder"),
    ("--ckpt {tmp}/plain.pt --guidance 2", "--guidance 2.0: needs a model with classes or text, "
                                           "and .*plain.pt was trained without"),
    ("--ckpt {tmp}/plain.pt --label 1", "--label 1: needs a model with classes, and .*plain.pt "
                                        "was trained without"),
    ("--prompt rose", "--prompt: needs a model with --text, and .*model.pt was trained without"),
    ("--portrait", "--portrait: needs a model with --portrait, and .*model.pt was trained "
                   "without"),
    ("--prompts {tmp}/nowhere.txt", "--prompts .*nowhere.txt: No such file"),
    ("--prompts {tmp}/empty.pt", "--prompts .*empty.pt: holds no line"),
    ("--schedule linear", "--schedule linear: must be one of cosine"),
    ("--guidance-interval 1 x", "--guidance-interval x: must be a finite number"),
    ("--guidance-interval 1", "--guidance-interval expected 2 arguments"),
    ("--guidance-interval 5 -3", "--guidance-interval 5.0 -3.0: the first must be the lower"),
    ("--between 0", "--between expected 2 arguments"),
    ("--n 3 --between 0 -1", "--between 0 -1: needs two different numbers from 0"),
    ("--n 3 --between 2 2", "--between 2 2: needs two different numbers from 0 on, and --n of 2"),
    ("--n 1 --between 1 2", "--between 1 2: needs two different numbers from 0 on, and --n of 2"),
    ("--n 3 --between 0 1 --film", "--between: not together with --film or --guidance-interval"),
    ("--n 3 --between 0 1 --guidance-interval -3 5", "--between: not together with --film or --g"),
    ("--guidance 1 --guidance-interval -3 5", "--guidance-interval: needs a --guidance other than"),
    ("--ckpt {tmp}/plain.pt --guidance-interval -3 5", "--guidance-interval: needs a --guidance")]


@pytest.mark.parametrize("flags, words", WRONG_SAMPLES, ids=[flags for flags, _ in WRONG_SAMPLES])
def test_wrong_call_of_sample_is_one_line_and_exit_code_2(
        tmp_path, trained_run, capsys, flags, words):
    (tmp_path / "empty.pt").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/000007.png").write_bytes(b"a picture of the user's own")
    saved = checkpoint.read(trained_run / "model.pt")
    saved["network"]["classes"] = 0
    plain = checkpoint.build_network(**saved["network"]).state_dict()
    torch.save(saved | dict(classes=[], ema=plain), tmp_path / "plain.pt")
    before = sorted(tmp_path.rglob("*"))
    flags = ["--ckpt", trained_run / "model.pt", "--n", "1", "--steps", "1", "--out",
             tmp_path / "new", *flags.format(tmp=tmp_path, here=HERE).split()]
    error = one_line(capsys, sampling.main, flags)
    assert re.match(words, error), error
    assert sorted(tmp_path.rglob("*")) == before
