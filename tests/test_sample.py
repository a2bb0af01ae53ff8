"""sample.py as a program."""
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import data
import flowers
import loss as losses
import ranks
import run
import sample as sampling
import schedule
import uvit
from config import parse_sampling
from noise import picture_noise
from tests.helpers import (HERE, PYTHON, TORCHRUN, condition, full_disk, one_line, run_script,
                           run_train)


@pytest.fixture
def calls(monkeypatch):
    """Calls of the sampler that sample.py makes: a list of {name of the argument: value}."""
    made, original = [], sampling.sampling_steps
    names = "model schedule noise steps cond sampler gamma guidance interval".split()
    monkeypatch.setattr(sampling, "sampling_steps", lambda *arguments: made.append(
        dict(zip(names, arguments, strict=True))) or original(*arguments))
    return made


def pngs(folder):
    """{name of a picture: its bytes}"""
    return {file.name: file.read_bytes() for file in Path(folder).glob("0*.png")}


def test_film_shows_noise_become_the_first_picture(tmp_path, trained_run):
    out = tmp_path / "out"
    flags = ["--ckpt", str(trained_run / "model.pt"), "--n", "3", "--steps", "9", "--batch", "2"]
    sampling.main([*flags, "--out", str(out)])
    before = pngs(out)
    assert not (out / "film.png").exists()
    sampling.main([*flags, "--out", str(out), "--film"])
    film, picture = (np.asarray(Image.open(out / name)) for name in ("film.png", "000000.png"))
    h, w, _ = picture.shape
    assert film.shape == (2 * h, 9 * w, 3) and pngs(out) == before
    assert np.array_equal(film[h:, -w:], picture)           # x_hat at the last step is the picture
    noise = data.to_uint8(picture_noise(0, [0], h, "cpu")()[:1])[0]
    assert np.array_equal(film[:h, :w], noise)
    sampling.main([*flags, "--out", str(tmp_path / "at once"), "--film"])
    assert (tmp_path / "at once/film.png").read_bytes() == (out / "film.png").read_bytes()
    sampling.main(["--ckpt", str(trained_run / "model.pt"), "--n", "1", "--steps", "25",
                   "--out", str(tmp_path / "long"), "--film"])
    assert Image.open(tmp_path / "long/film.png").size == (9 * w, 2 * h)
    with Image.open(tmp_path / "long/film.webp") as moving:
        factor = 256 // w
        assert (moving.n_frames, moving.size) == (25, (factor * w, factor * h))
        for frame, column in ((0, 0), (24, 8)):                 # x_hat of the first and last steps
            moving.seek(frame)
            shown = np.asarray(moving.convert("RGB"))[::factor, ::factor]
            film = np.asarray(Image.open(tmp_path / "long/film.png"))
            assert np.array_equal(shown, film[h:, column * w:(column + 1) * w])


def test_walk_mixes_noise_on_a_circle_and_v_hat_on_a_line():
    options = SimpleNamespace(between=[4, 7], n=3, seed=5, guidance=1)
    conds = [uvit.Condition(label, 0, []) for label in (2, 6)]      # pictures 4 and 7: 2 and 6

    def labels(z, logsnr, cond):
        return cond.label[:, None, None, None].expand_as(z)

    mixed, new_noise = sampling.walk(labels, options, conds, [0, 1, 2], 16,
                                    torch.device("cpu"))
    plain = picture_noise(5, [4, 7], 16, "cpu")
    for _ in range(2):                                              # each step has noise of its own
        (a, b), found = plain(), new_noise()
        torch.testing.assert_close(found, torch.stack([a, (a + b) / 2**.5, b]), atol=1e-6, rtol=0)
    assert mixed(found, None, None).mean((1, 2, 3)).tolist() == [2, 4, 6]


def test_walk_begins_and_ends_with_the_pictures_it_joins(tmp_path, trained_run):
    flags = ["--ckpt", str(trained_run / "model.pt"), "--steps", "4", "--guidance", "2", "--bf16",
             "off"]
    sampling.main([*flags, "--n", "6", "--out", str(tmp_path / "plain")])
    sampling.main([*flags, "--n", "5", "--between", "1", "5", "--out", str(tmp_path / "walk")])
    plain, walk = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int)
                   for name in ("plain", "walk"))
    for at, number in ((0, 1), (-1, 5)):
        assert np.abs(walk[at] - plain[number]).max() <= 2          # rounding
    steps = np.abs(np.diff(walk, axis=0)).mean((1, 2, 3))
    assert steps.min() > 0 and steps.max() < np.abs(walk[0] - walk[-1]).mean()
    with Image.open(tmp_path / "walk/film.webp") as moving:
        assert moving.n_frames == 5
    before = pngs(tmp_path / "walk")
    sampling.main([*flags, "--n", "5", "--between", "1", "5", "--out", str(tmp_path / "walk")])
    assert pngs(tmp_path / "walk") == before
    assert Image.open(tmp_path / "walk/grid.png").width == 5 * walk.shape[2]


def test_film_and_grid_of_a_long_walk_show_100_of_its_pictures_from_end_to_end(tmp_path):
    options = parse_sampling(["--n", "201", "--between", "0", "1", "--batch", "300"])
    shown = []
    folder = SimpleNamespace(has=lambda numbers: True, read=lambda i: np.full((4, 4, 3), i),
                             save=lambda name, image: None, save_npz=lambda: None,
                             save_moving=lambda name, frames: shown.extend(frames))
    sampling.draw_all(None, None, options, [None], 4, ranks.Ranks(), folder)
    numbers = [frame[0, 0, 0] for frame in shown]
    assert numbers[0] == 0 and numbers[-1] == 200 and len(numbers) == 100
    assert set(np.diff(numbers)) == {2, 3}
    assert parse_sampling(["--prompt", "a", "b", "--between", "0", "1"]).n == 20


def test_sample_writes_grid_pngs_and_npz_the_same_on_one_rank_or_two(tmp_path, trained_run):
    flags = ["--ckpt", trained_run / "model.pt", "--n", "7", "--batch", "2", "--steps", "3",
             "--guidance", "2", "--seed", "5"]
    run_script(*PYTHON, "sample.py", *flags, "--out", tmp_path / "one")
    run_script(*TORCHRUN, "--nproc_per_node=2", "--", "sample.py", *flags, "--out",
               tmp_path / "two")
    files = [f"{i:06d}.png" for i in range(7)] + ["grid.png", "samples.npz", "settings.json"]
    arrays = []
    for name in ("one", "two"):
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == files
        arrays.append(np.load(tmp_path / name / "samples.npz")["arr_0"])
    one, two = arrays
    assert one.shape == (7, 32, 32, 3) and one.dtype == np.uint8 and np.array_equal(one, two)
    for i in range(7):
        assert np.array_equal(one[i], np.asarray(Image.open(tmp_path / f"one/{i:06d}.png")))
    assert Image.open(tmp_path / "one/grid.png").size == (320, 32)
    assert not np.array_equal(one[0], one[1])


def test_sample_takes_labels_by_name_or_number(tmp_path, trained_run):
    common = ["--ckpt", str(trained_run / "model.pt"), "--n", "2", "--steps", "2",
              "--sampler", "ddim"]
    for i, label in enumerate(["5 petals", "2"]):
        sampling.main([*common, "--out", str(tmp_path / str(i)), "--label", label])
    assert np.array_equal(*(np.load(tmp_path / i / "samples.npz")["arr_0"] for i in "01"))


def test_prompts_are_drawn_in_turns_from_the_command_line_and_from_a_file(tmp_path, little, calls):
    run_train(tmp_path / "run", "--steps", "2", "--text", "bytes")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a blue flower\n\nzwölf Blätter\n", encoding="utf-8")

    def captions(name, *flags):
        calls.clear()
        sampling.main(["--ckpt", str(tmp_path / "run/model.pt"), "--steps", "1", *flags,
                       "--out", str(tmp_path / name)])
        assert all(call["guidance"] == (1 if name == "c" else 3) for call in calls)
        return [bytes(byte - 1 for byte in row if byte).decode()
                for call in calls for row in call["cond"].tokens.tolist()]

    found = captions("a", "--prompt", "a red flower", "--prompts", str(prompts))
    assert found == ["a red flower", "a blue flower", "zwölf Blätter"]
    assert len(pngs(tmp_path / "a")) == 3
    found = captions("b", "--prompt", "a red flower", "blue", "--n", "5")
    assert found == ["a red flower", "blue", "a red flower", "blue", "a red flower"]
    assert captions("c", "--n", "2") == ["", ""]


def test_a_cpu_draws_four_pictures_at_a_time_or_as_many_as_asked(tmp_path, trained_run, calls):
    common = ["--ckpt", str(trained_run / "model.pt"), "--n", "6", "--steps", "1"]
    sizes = []
    for name, *flags in ["a"], ["b", "--batch", "5"]:
        calls.clear()
        sampling.main([*common, "--out", str(tmp_path / name), *flags])
        sizes.append([len(call["cond"].label) for call in calls])
    assert sizes == [[4, 2], [5, 1]]


def test_bf16_of_sampling_is_as_asked_or_as_the_hardware_has_it(tmp_path, little, monkeypatch):
    run_train(tmp_path / "run", "--steps", "1")
    seen, honest = [], sampling.sampling_steps
    monkeypatch.setattr(sampling, "sampling_steps", lambda *args: seen.append(
        torch.is_autocast_enabled("cpu")) or honest(*args))
    for i, flags in enumerate((["--bf16", "on"], ["--bf16", "off"], [])):
        sampling.main(["--ckpt", str(tmp_path / "run/model.pt"), "--n", "1", "--steps", "1", *flags,
                       "--out", str(tmp_path / f"{i}")])
    assert seen == [True, False, ranks.Ranks().has_bf16]


def test_options_of_sampling_reach_the_sampler(tmp_path, little, calls, capsys):
    run_train(tmp_path / "run", "--steps", "1", "--set", "noise_d=64")
    common = ["--ckpt", str(tmp_path / "run/model.pt"), "--n", "1"]
    sampling.main([*common, "--steps", "2", "--sampler", "ancestral", "--gamma", "0.7",
                   "--guidance", "2.5", "--guidance-interval", "-3", "5", "--out",
                   str(tmp_path / "a")])
    sampling.main([*common, "--out", str(tmp_path / "b")])
    sampling.main([*common, "--sampler", "ddim", "--schedule", "cosine", "--out",
                   str(tmp_path / "c")])
    sampling.main([*common, "--sampler", "dpm", "--out", str(tmp_path / "d")])
    saved = torch.load(tmp_path / "run/model.pt")
    for name, classes in ("no classes.pt", []), ("one class.pt", ["one"]):
        network = saved["network"] | dict(classes=len(classes))
        torch.save(saved | dict(network=network, classes=classes, ema=checkpoint.build_network(
            **network).state_dict()), tmp_path / name)
    sampling.main(["--ckpt", str(tmp_path / "no classes.pt"), "--n", "1", "--out",
                   str(tmp_path / "e")])
    torch.save(saved | dict(config=saved["config"] | dict(drop_label=0.0)),
               tmp_path / "none dropped.pt")
    sampling.main(["--ckpt", str(tmp_path / "none dropped.pt"), "--n", "1", "--out",
                   str(tmp_path / "f")])
    sampling.main(["--ckpt", str(tmp_path / "one class.pt"), "--n", "1", "--out",
                   str(tmp_path / "g")])
    assert "was trained with drop_label=0" in one_line(
        capsys, sampling.main, ["--ckpt", tmp_path / "none dropped.pt", "--guidance", "3", "--out",
                                tmp_path / "h"])
    given, usual, cosine, dpm, without_classes, none_dropped, one_class = calls
    t = torch.tensor([.3])
    assert torch.equal(given["schedule"](t), schedule.logsnr_shifted(t, 32, 64))
    assert torch.equal(cosine["schedule"](t), schedule.logsnr_cosine(t))
    spacing = sampling.asinh_spacing(lambda t: schedule.logsnr_shifted(t, 32, 64), 32)
    assert torch.equal(usual["schedule"](t), spacing(t))
    assert torch.equal(dpm["schedule"](t), spacing(t))
    options = "steps", "sampler", "gamma", "guidance"
    assert [given[name] for name in options] == [2, "ancestral", .7, 2.5]
    assert [cosine[name] for name in options] == [128, "ddim", .2, 3]
    assert tuple(given["interval"]) == (-3, 5)
    assert [usual[name] for name in options] == [18, "sde", .2, 3]
    assert [dpm[name] for name in options] == [18, "dpm", .2, 3]
    assert [without_classes[name] for name in options] == [18, "sde", .2, 1]
    assert [none_dropped[name] for name in options] == [18, "sde", .2, 1]
    assert [one_class[name] for name in options] == [18, "sde", .2, 1]
    assert usual["interval"][0] < -50 and usual["interval"][1] > 50         # everywhere


def test_sample_without_a_run_draws_with_the_bundled_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--prompt", "a red flower with five petals"]
    for flags, name, size in (["--n", "1"], "photos", 64), (words, "words", 40):
        sampling.main([*flags, "--steps", "1"])
        assert f"assets/{name}.pt" in capsys.readouterr().out
        assert Image.open("samples/000000.png").size == (size, size)
        assert (HERE / f"assets/{name}.pt").stat().st_size <= 16e6


@torch.no_grad()
def test_bundled_flowers_know_their_class():
    """assets/flowers.pt on 40 new flowers: the right class helps. The weights after the first
    stage of their training do not meet these bounds.
    """
    model, saved = checkpoint.load_model(HERE / "assets" / "flowers.pt", "cpu")
    assert {weights.dtype for weights in saved["ema"].values()} == {torch.bfloat16}
    assert saved["config"]["out"] == ""
    fresh = flowers.Flowers(saved["config"]["res"], 12345)
    x, cond, _ = data.collate([fresh[n] for n in range(40)])
    x = x / 127.5 - 1
    logsnr = torch.full((40,), -3.)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    alpha, sigma = schedule.alpha_sigma(logsnr)
    z, errors = alpha * x + sigma * eps, []
    for label in (cond.label, (cond.label + 5) % 10):
        x_hat = losses.x_from_v(z, model(z, logsnr, condition(label)), alpha, sigma)
        errors.append((x_hat - x).square().mean())
    right, wrong = errors
    assert right < .0165 and wrong > 2.5 * right, (right, wrong)


def test_killed_sample_goes_on_to_the_same_pictures(tmp_path, trained_run, monkeypatch, capsys):
    flags = ["--ckpt", str(trained_run / "model.pt"), "--n", "14", "--batch", "4", "--steps", "2",
             "--out"]
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    sampling.main([*flags, str(unbroken)])
    original = checkpoint.write

    def write(path, write_to):
        if path.name == "000009.png":
            for half in ("000009.png.part", "film.png.part"):
                (killed / half).write_bytes(b"half a pict")
            raise KeyboardInterrupt
        original(path, write_to)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "write", write)
        sampling.main([*flags, str(killed)])
    times = lambda: {file.name: file.stat().st_mtime_ns for file in killed.glob("0*.png")}
    kept = times()
    assert sorted(kept) == [f"{i:06d}.png" for i in range(9)]
    sampling.main([*flags, str(killed)])
    names = sorted(file.name for file in unbroken.iterdir())
    assert names == sorted(file.name for file in killed.iterdir()) and len(names) == 14 + 3
    for name in set(names) - {"samples.npz"}:
        assert (unbroken / name).read_bytes() == (killed / name).read_bytes()
    assert np.array_equal(*(np.load(folder / "samples.npz")["arr_0"]
                            for folder in (unbroken, killed)))
    again = {name for name, time in kept.items() if times()[name] != time}
    assert again == {"000008.png"}                      # of the batch that was not complete

    error = one_line(capsys, sampling.main, [*flags, killed, "--seed", "1"])
    assert "holds other pictures (--seed 0, now 1): name another folder" in error


def test_full_disk_ends_sampling_with_a_line_and_complete_files(tmp_path, trained_run, capsys):
    with full_disk(500), pytest.raises(SystemExit) as stop:
        sampling.main(["--ckpt", str(trained_run / "model.pt"), "--n", "2", "--steps", "2",
                       "--out", str(tmp_path / "full")])
    assert stop.value.code == 1
    assert "File too large; finished files are complete" in capsys.readouterr().err
    assert not list((tmp_path / "full").glob("*.p*"))


def test_sample_starts_over_in_its_own_folder_with_other_settings(
        tmp_path, trained_run, monkeypatch):
    """samples/ is for a quick look: other settings replace its pictures, the same keep them."""
    monkeypatch.chdir(tmp_path)
    flags = ["--ckpt", str(trained_run / "model.pt"), "--steps", "1"]
    sampling.main([*flags, "--n", "3"])
    first, time = pngs("samples"), Path("samples/000000.png").stat().st_mtime_ns
    sampling.main([*flags, "--n", "3"])
    assert Path("samples/000000.png").stat().st_mtime_ns == time
    sampling.main([*flags, "--n", "2", "--seed", "1"])
    second = pngs("samples")
    assert len(first) == 3 and len(second) == 2 and first["000000.png"] != second["000000.png"]


def test_a_finished_picture_of_another_size_is_drawn_again(tmp_path, trained_run):
    flags = ["--ckpt", str(trained_run / "model.pt"), "--n", "2", "--steps", "1", "--out",
             str(tmp_path)]
    sampling.main(flags)
    before = pngs(tmp_path)
    Image.new("RGB", (9, 9)).save(tmp_path / "000001.png")
    sampling.main(flags)
    assert pngs(tmp_path) == before


def test_pictures_of_other_weights_are_not_mixed_with_those_there(tmp_path, trained_run, capsys):
    saved = checkpoint.read(trained_run / "model.pt")
    torch.save(saved, tmp_path / "same.pt")
    saved["ema"]["norm_out.bias"] += 1
    torch.save(saved, tmp_path / "other.pt")
    flags = ["--n", "1", "--steps", "1", "--out", tmp_path / "out", "--ckpt"]
    sampling.main([*map(str, flags), str(tmp_path / "same.pt")])
    (tmp_path / "same.pt").rename(tmp_path / "moved.pt")
    sampling.main([*map(str, flags), str(tmp_path / "moved.pt")])   # a file is its contents
    error = one_line(capsys, sampling.main, [*flags, tmp_path / "other.pt"])
    assert "holds other pictures (of another model)" in error


def test_out_of_memory_in_sampling_is_one_line(tmp_path, trained_run, monkeypatch, capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore words")

    monkeypatch.setattr(sampling, "sampling_steps", full)
    with pytest.raises(SystemExit) as stop:
        sampling.main(["--ckpt", str(trained_run / "model.pt"), "--n", "1", "--batch", "16",
                       "--out", str(tmp_path / "out")])
    assert stop.value.code == 1 and capsys.readouterr().err == \
        "--batch 16: CUDA out of memory. Tried to allocate 9 GiB. A lower --batch takes less.\n"


def test_sample_takes_the_newest_run(tmp_path, trained_run, monkeypatch, capsys):
    for age, name in enumerate(["old", "new"]):
        (tmp_path / "runs" / name).mkdir(parents=True)
        file = tmp_path / "runs" / name / "model.pt"
        file.write_bytes((trained_run / "model.pt").read_bytes())
        os.utime(file, (age + 1000, age + 1000))
    monkeypatch.chdir(tmp_path)
    sampling.main(["--n", "1", "--steps", "1"])
    assert "runs/new/model.pt" in capsys.readouterr().out


class Casts(TorchDispatchMode):
    """Counts how often these weights are cast to bfloat16."""

    def __init__(self, weights):
        super().__init__()
        self.places, self.count = {weight.data_ptr() for weight in weights}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.places:
            self.count += kwargs.get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


def test_autocast_casts_each_weight_once_however_many_steps_there_are(trained_run):
    """It keeps the casts of weights that take gradients only."""
    model, saved = checkpoint.load_model(trained_run / "model.pt", "cpu")
    unit = lambda: torch.randn(2, 3, 32, 32)
    counts = []
    for steps in (1, 5):
        with torch.autocast("cpu", torch.bfloat16), Casts(model.parameters()) as casts:
            sampling.sample(model, schedule.logsnr_cosine, unit, steps, condition([0, 1]))
        counts.append(casts.count)
    assert counts[0] == counts[1] > 10, counts


def test_a_report_casts_each_weight_of_the_ema_once(tmp_path, little, monkeypatch):
    counts, honest = [], run.Run.report

    def counted(self):
        with Casts(self.ema.parameters()) as casts:
            honest(self)
        counts.append(casts.count)

    monkeypatch.setattr(run.Run, "report", counted)
    for steps in (1, 3):
        monkeypatch.setattr(run, "REPORT_STEPS", steps)
        run_train(tmp_path / str(steps), "--steps", 1, "--sample-every", 1, "--set", "bf16=on")
    assert counts[0] == counts[1] > 10, counts
