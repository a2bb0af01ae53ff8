"""sample.py as a program."""
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import loss as losses
import sample as sampling
import schedule
from helpers import full_disk
from test_all import HERE, PYTHON, TORCHRUN, one_line, run_script, run_train


def test_film_shows_noise_become_the_first_picture(tmp_path, trained_run):
    flags = ["--ckpt", str(trained_run / "model.pt"), "--n", "3", "--steps", "9", "--out", str(tmp_path / "out")]
    sampling.main([*flags, "--batch", "2"])
    when = (tmp_path / "out/000000.png").read_bytes()
    assert not (tmp_path / "out/film.png").exists()
    sampling.main([*flags, "--batch", "2", "--film"])
    film, picture = np.asarray(Image.open(tmp_path / "out/film.png")), np.asarray(Image.open(tmp_path / "out/000000.png"))
    h, w, _ = picture.shape
    assert film.shape == (2 * h, 9 * w, 3) and when == (tmp_path / "out/000000.png").read_bytes()
    assert np.array_equal(film[h:, -w:], picture)                               # x_hat at the last step is the picture
    noise = sampling.to_uint8(sampling.picture_noise(0, [0], h, "cpu")()[:1])[0]
    assert np.array_equal(film[:h, :w], noise)
    sampling.main([*flags[:-1], str(tmp_path / "at once"), "--batch", "2", "--film"])
    assert (tmp_path / "at once/film.png").read_bytes() == (tmp_path / "out/film.png").read_bytes()
    sampling.main([*flags[:-3], "25", "--n", "1", "--out", str(tmp_path / "long"), "--film"])
    assert Image.open(tmp_path / "long/film.png").size == (9 * w, 2 * h)


def test_sample_writes_grid_pngs_and_npz_the_same_on_one_rank_or_two(tmp_path, trained_run):
    flags = ["--ckpt", trained_run / "model.pt", "--n", "7", "--batch", "2", "--steps", "3", "--guidance", "2", "--seed", "5"]
    run_script(*PYTHON, "sample.py", *flags, "--out", tmp_path / "one")
    run_script(*TORCHRUN, "--nproc_per_node=2", "--", "sample.py", *flags, "--out", tmp_path / "two")
    for name in ("one", "two"):
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == [f"{i:06d}.png" for i in range(7)] + ["grid.png", "samples.npz", "settings.json"]
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert one.shape == (7, 32, 32, 3) and one.dtype == np.uint8 and np.array_equal(one, two)
    assert all(np.array_equal(one[i], np.asarray(Image.open(tmp_path / f"one/{i:06d}.png"))) for i in range(7))
    assert Image.open(tmp_path / "one/grid.png").size == (320, 32)
    assert not np.array_equal(one[0], one[1])


def test_sample_takes_labels_by_name_or_number(tmp_path, trained_run):
    common = ["--ckpt", str(trained_run / "model.pt"), "--n", "2", "--steps", "2", "--sampler", "ddim"]
    for i, label in enumerate(["5 petals", "2"]):
        sampling.main([*common, "--out", str(tmp_path / str(i)), "--label", label])
    assert np.array_equal(*(np.load(tmp_path / i / "samples.npz")["arr_0"] for i in "01"))


def test_prompts_are_drawn_in_turns_from_the_command_line_and_from_a_file(tmp_path, little, monkeypatch):
    run_train(tmp_path / "run", "--steps", "2", "--text", "bytes")
    honest, told = sampling.sample, []
    monkeypatch.setattr(sampling, "sample", lambda model, logsnr, noise, steps, label, *rest, **options:
                        "--guidance" in common and rest[-1] == [-3, 5] and told.extend(bytes(byte - 1 for byte in row[2:].tolist() if byte).decode() for row in label)
                        or honest(model, logsnr, noise, steps, label, *rest, **options))
    (tmp_path / "prompts.txt").write_text("a blue flower\n\nzwölf Blätter\n", encoding="utf-8")
    common = ["--ckpt", str(tmp_path / "run/model.pt"), "--steps", "1", "--guidance", "3", "--guidance-interval", "-3", "5"]
    sampling.main([*common, "--prompt", "a red flower", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "a")])
    assert told == ["a red flower", "a blue flower", "zwölf Blätter"] and len(list((tmp_path / "a").glob("0*.png"))) == 3
    told.clear()
    sampling.main([*common, "--prompt", "a red flower", "blue", "--n", "5", "--out", str(tmp_path / "b")])
    assert told == ["a red flower", "blue", "a red flower", "blue", "a red flower"]
    told.clear()
    sampling.main([*common, "--n", "2", "--out", str(tmp_path / "c")])
    assert told == ["", ""]


def test_flags_of_sampling_reach_the_sampler(tmp_path, little, monkeypatch):
    run_train(tmp_path / "run", "--steps", "1", "--noise-d", "64")
    honest, told = sampling.sample, {}
    monkeypatch.setattr(sampling, "sample", lambda model, logsnr, noise, steps, label, sampler, gamma, guidance, interval, **rest:
                        told.update(logsnr=logsnr(torch.tensor([.3])), steps=steps, sampler=sampler, gamma=gamma, guidance=guidance, interval=interval)
                        or honest(model, logsnr, noise, steps, label, sampler, gamma, guidance, interval, **rest))
    common = ["--ckpt", str(tmp_path / "run/model.pt"), "--n", "1"]
    sampling.main([*common, "--steps", "2", "--sampler", "ddim", "--gamma", "0.7", "--guidance", "2.5", "--guidance-interval", "-3", "5", "--out", str(tmp_path / "a")])
    assert told == dict(logsnr=schedule.logsnr_shifted(torch.tensor([.3]), 32, 64), steps=2, sampler="ddim", gamma=.7, guidance=2.5, interval=[-3, 5])
    sampling.main([*common, "--out", str(tmp_path / "b")])
    assert (told["steps"], told["sampler"], told["gamma"], told["guidance"], told["interval"]) == (128, "ancestral", .2, 1, [-99, 99])


def test_sample_without_a_run_draws_with_the_released_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "a red flower with five petals", "--guidance", "3"]
    for flags, name, size in (["--n", "1"], "flowers", 128), (words, "words", 40):
        sampling.main([*flags, "--steps", "1"])
        assert f"assets/{name}.pt" in capsys.readouterr().out and Image.open("samples/000000.png").size == (size, size)
        assert (HERE / f"assets/{name}.pt").stat().st_size <= 16e6


@torch.no_grad()
def test_released_flowers_know_their_class():
    """assets/flowers.pt on 40 flowers it has not seen: the right class helps. Bounds that its own first go fails."""
    model, saved = sampling.load_model(HERE / "assets" / "flowers.pt", "cpu")
    assert {weights.dtype for weights in saved["ema"].values()} == {torch.bfloat16} and saved["config"]["out"] == ""
    fresh = data.Flowers(saved["config"]["res"], 12345)
    x, label = (torch.stack(part) for part in zip(*[fresh[n][:2] for n in range(40)]))
    logsnr = torch.full((40,), -3.)
    eps, (alpha, sigma) = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), schedule.alpha_sigma(logsnr)
    z = alpha * x + sigma * eps
    right, wrong = ((losses.x_from_v(z, model(z, logsnr, asked), alpha, sigma) - x).square().mean()
                    for asked in (label[:, 0], (label[:, 0] + 5) % 10))
    assert right < .0165 and wrong > 2.5 * right, (right, wrong)


def test_sample_killed_half_way_goes_on_to_the_same_pictures(tmp_path, trained_run, monkeypatch, capsys):
    flags = ["--ckpt", str(trained_run / "model.pt"), "--n", "14", "--batch", "4", "--steps", "2", "--out"]
    sampling.main([*flags, str(tmp_path / "unbroken")])
    honest = sampling.write

    def killed(path, write_to):
        if path.name == "000009.png":
            (tmp_path / "killed/000009.png.part").write_bytes(b"half a pict")
            raise KeyboardInterrupt
        honest(path, write_to)
    monkeypatch.setattr(sampling, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        sampling.main([*flags, str(tmp_path / "killed")])
    kept = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "killed").glob("0*.png")}
    assert sorted(kept) == [f"{i:06d}.png" for i in range(9)]
    monkeypatch.undo()
    sampling.main([*flags, str(tmp_path / "killed")])
    names = sorted(file.name for file in (tmp_path / "unbroken").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "killed").iterdir()) and len(names) == 14 + 3
    for name in names:
        assert name == "samples.npz" or (tmp_path / "unbroken" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert np.array_equal(*(np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("unbroken", "killed")))
    again = {name for name, when in kept.items() if (tmp_path / "killed" / name).stat().st_mtime_ns != when}
    assert again == {"000008.png"}                      # of the batch that was not whole

    error = one_line(capsys, sampling.main, [*flags, tmp_path / "killed", "--seed", "1"])
    assert "holds other pictures (--seed 0, now 1): name another folder" in error
    with full_disk(500), pytest.raises(SystemExit) as stop:
        sampling.main([*flags, str(tmp_path / "full")])
    assert stop.value.code == 1 and "File too large; what is there is whole" in capsys.readouterr().err
    assert not list((tmp_path / "full").glob("*.p*"))


def test_sample_starts_over_in_its_own_folder_when_asked_for_others(tmp_path, trained_run, monkeypatch):
    """samples/ is for a quick look: other settings replace what was there, the same settings keep it."""
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(trained_run / "model.pt"), "--steps", "1"]
    sampling.main([*flags, "--n", "3"])
    first = {file.name: file.read_bytes() for file in Path("samples").glob("0*.png")}
    when = Path("samples/000000.png").stat().st_mtime_ns
    sampling.main([*flags, "--n", "3"])
    assert Path("samples/000000.png").stat().st_mtime_ns == when
    sampling.main([*flags, "--n", "2", "--seed", "1"])
    second = {file.name: file.read_bytes() for file in Path("samples").glob("0*.png")}
    assert len(first) == 3 and len(second) == 2 and first["000000.png"] != second["000000.png"]


def test_out_of_memory_in_sampling_is_one_line(tmp_path, trained_run, monkeypatch, capsys):
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore words")
    monkeypatch.setattr(sampling, "sample", full)
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--ckpt", str(trained_run / "model.pt"), "--n", "1", "--out", str(tmp_path / "out")])
    assert stop.value.code == 1 and capsys.readouterr().err == \
        "--batch 16: CUDA out of memory. Tried to allocate 9 GiB. A lower --batch takes less.\n"


def test_sample_takes_the_newest_run(tmp_path, trained_run, monkeypatch, capsys):
    for age, name in enumerate(["old", "new"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "model.pt").write_bytes((trained_run / "model.pt").read_bytes())
        os.utime(tmp_path / "runs" / name / "model.pt", (age + 1000, age + 1000))
    monkeypatch.chdir(tmp_path)
    sampling.main(["--n", "1", "--steps", "1"])
    assert "runs/new/model.pt" in capsys.readouterr().out
