"""benchmarks/: scores, ablations, the paper's arguments, mutants."""
import argparse
import contextlib
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import ablations
import arguments
import mutants
import numpy as np
import pytest
import samplers
import scale
import score
import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
import config as config_module
import data
import flowers
import loss as losses
import run
import schedule
import train
import uvit
from noise import draw_noise
from tests.helpers import HERE, PYTHON, condition, one_line, run_script


# ---------------------------------------------------------------------------- score.py

def write_flowers(folder, *kinds, res=48):
    """Flowers 000000.png, ... of these (colours or None, numbers of petals)."""
    for i, (colours, petals) in enumerate(kinds):
        rng = np.random.default_rng(i)
        picture, _ = flowers.draw_flower(rng, petals, res, colours or flowers.PETALS)
        Image.fromarray((picture * 255).astype(np.uint8)).save(folder / f"{i:06d}.png")


def upside_down_above(x, rows=28):
    """The upper half of each flower upside down."""
    half = x.clone()
    half[:, :, :rows] = half[:, :, :rows].flip(2)
    return half


def test_score_reads_petals_and_colour_of_real_flowers_and_sees_what_is_wrong():
    x, petals, colour = score.real(100, 64)
    found = score.score(x)
    assert (found["petals"] == petals).float().mean() >= .99
    assert np.mean([a == b for a, b in zip(found["colour"], colour)]) >= .99
    squeezed = score.score(F.interpolate(x[:40], (64, 80), mode="bilinear"))
    assert abs(squeezed["axes"].median() - .8) < .02
    assert score.summary(squeezed).endswith("| 0% |")
    half = score.score(upside_down_above(x[:40]))
    assert half["asymmetry"].median() > 1.5 * found["asymmetry"].median()


def test_petals_are_counted_though_one_is_missing():
    """A ninth of a turn is painted over: the others still repeat as often."""
    x, petals, _ = score.real(120, 56, seed=9)
    side = torch.linspace(-1, 1, 56)
    gone = torch.where(torch.atan2(side[:, None], side).abs() < math.pi / 9, x[:, :, :1, :1], x)
    assert (score.find(gone)[1] == petals).float().mean() > .95


def test_other_numbers_than_real_flowers_have_are_read_as_such(monkeypatch):
    """Two lobes are not three petals, and thirteen or fourteen are not twelve."""
    names = [*flowers.NUMBERS, "thirteen", "fourteen", "two"]
    monkeypatch.setattr(flowers, "NUMBERS", names)              # for the captions
    petals = torch.tensor(20 * [2, 13, 14])
    x = np.stack([flowers.draw_flower(np.random.default_rng((6, i)), int(k), 64)[0]
                  for i, k in enumerate(petals)])
    found = score.score(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert (found["petals"] == petals).float().mean() >= .95
    assert found["asymmetry"].median() < .5


def test_score_asks_for_200_new_flowers(tmp_path):
    parse = score.parse_prompt
    assert parse("A blue flower with eleven petals on cream") == ("blue", 11)
    assert parse("a flower, 7 petals") == (None, 7) and parse("a red one") == ("red", None)
    assert parse("three petals")[1] == 3 and parse("12 petals")[1] == 12
    score.main(["--new", str(tmp_path / "prompts")])
    prompts = (tmp_path / "prompts").read_text().splitlines()
    pairs = [parse(prompt) for prompt in prompts]
    assert len(prompts) == 200 and len(set(prompts)) > 150 and len(set(pairs)) == 20
    assert all(flowers.never_shown(*pair) for pair in pairs)


def test_score_asks_how_often_pictures_match_their_prompt_or_class(tmp_path, capsys, monkeypatch):
    assert (score.REAL, score.TRUTH) == (200, 500)
    monkeypatch.setattr(score, "REAL", 20)
    monkeypatch.setattr(score, "TRUTH", 50)

    def printed(*flags):
        score.main([str(tmp_path), *flags])
        return capsys.readouterr().out

    # In turns; of four pictures one has the wrong colour, two the wrong number.
    write_flowers(tmp_path, (["red"], 8), (["white"], 5), (["red"], 8), (["blue"], 9))
    prompts = tmp_path / "prompts"
    prompts.write_text("a red flower with 8 petals\n\na white flower with six petals\n")
    out = printed("--prompts", str(prompts))
    assert f"| {tmp_path} | 4 | 50.0% | 75.0% |" in out
    assert "number of petals: 6 0%, 8 100%\n" in out
    assert "by colour: red 100%, white 50%\n" in out
    write_flowers(tmp_path, *((None, petals) for petals in (3, 5, 5, 6)))       # of 3, 4, 5, 6
    out = printed("--classes")
    assert f"| {tmp_path} | 4 | 75.0% | |" in out.replace("  ", " ")
    assert "petals: 3 100%, 4 0%, 5 100%, 6 100%\n" in out and "by colour" not in out
    assert "| real flowers | 20 |" in out
    write_flowers(tmp_path, *[(None, 6)] * 21)          # as many real ones as samples, if more
    assert "| real flowers | 21 |" in printed()
    assert "not allowed with" in one_line(capsys, score.main, ["--classes", "--prompts", "x"])


def test_detail_and_distance_see_blur_broken_structure_and_wrong_colours():
    truth, y = score.real(300, 64, seed=7)[0], score.real(150, 64)[0]
    kinds = dict(real=y, half=upside_down_above(y), swapped=y[:, [0, 2, 1]],
                 blurred=F.avg_pool2d(y, 3, 1, 1))
    found = {name: score.compare(x, truth) for name, x in kinds.items()}
    assert abs(found["real"]["detail"] - 1) < .15 and found["blurred"]["detail"] < .2
    flat = torch.cat([y, torch.full_like(y[:1], .5)])       # one of 151
    assert .8 < score.compare(flat, truth)["detail"] / found["real"]["detail"] < 1
    assert all(found[name]["distance"] > 2 * found["real"]["distance"]
               for name in ("half", "swapped", "blurred")), found


def test_distance_on_trained_features_sees_blur_and_names_what_is_missing(
        tmp_path, monkeypatch, capsys):
    write_flowers(tmp_path, (None, 5), (None, 6), res=32)
    monkeypatch.setattr(score, "REAL", 2)
    monkeypatch.setattr(score, "TRUTH", 20)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        error = one_line(capsys, score.main, [tmp_path, "--efficientnet"])
        assert "pip install efficientnet-lite-pytorch" in error
    pytest.importorskip("efficientnet_lite_pytorch")
    truth, y = score.real(60, 32, seed=7)[0], score.real(40, 32)[0]
    sharp, blurred = (score.compare(x, truth, trained=True)["distance"]
                      for x in (y, F.avg_pool2d(y, 5, 1, 2)))
    assert blurred > 1.5 * sharp


def frechet_by_roots(a, b):
    """The distance by symmetric matrix roots, over the trace of b's covariance."""
    def root(matrix):
        spread, axes = torch.linalg.eigh(matrix)
        return axes * spread.clamp(min=0).sqrt() @ axes.T

    A, B = torch.cov(a.T), torch.cov(b.T)
    cross = root(root(B) @ A @ root(B)).trace()
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + A.trace() + B.trace() - 2 * cross) / B.trace()


def test_octaves_are_those_of_waves_and_the_distance_that_of_gaussians():
    for k, period in enumerate((3, 6, 12, 24)):         # octave k: periods of 2 2^k to 4 2^k pixels
        wave = torch.cos(2 * math.pi * torch.arange(96) / period).expand(1, 3, 96, 96)
        assert score.octaves(wave)[0].argmax() == k and score.octaves(wave.mT)[0].argmax() == k
    a, b = (torch.randn(4000, 3, dtype=torch.double) for _ in range(2))
    scale, shift = torch.tensor([1., 2., 3.]), torch.tensor([0., 1., 0.])
    exact = (shift.square() + (scale - 1).square()).sum() / 3   # |mu|^2 + sum of (s_a - s_b)^2
    assert abs(score.frechet(a * scale + shift, b) - exact) < .1 and score.frechet(b, b) < 1e-6
    for count in (1, 2, 201):                   # copies of one picture: no covariance to compare
        copies, spread = a[:1].expand(count, -1), b.var(0).sum()
        exact = ((a[0] - b.mean(0)).square().sum() + spread) / spread
        assert math.isclose(score.frechet(copies, b), exact, rel_tol=1e-9)
        more = torch.cat([b, b[:5]])
        assert math.isclose(score.frechet(copies, more), exact, rel_tol=.01)
    few, wide = (torch.randn(n, 40, dtype=torch.double) for n in (7, 9))    # singular covariances
    assert math.isclose(score.frechet(few, wide), frechet_by_roots(few, wide), rel_tol=1e-6)
    assert abs(score.frechet(few, few)) < 1e-12
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double))[0]
    turned = rotation * torch.tensor([.1, 1., 10.])
    whitened = score.frechet(*score.whiten(a, b))
    assert abs(score.frechet(*score.whiten(a @ turned, b @ turned)) - whitened) < 1e-6


@pytest.mark.parametrize("flags, words", [
    ("nowhere", "nowhere: no picture there"),
    ("{tmp} --prompts {tmp}/none", "holds no line"),
    ("{tmp} --prompts nowhere", "No such file"),
    ("--new nowhere/prompts", "No such file")])
def test_wrong_call_of_score_ends_with_exit_code_2(tmp_path, flags, words, capsys):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    (tmp_path / "none").write_text("\n")
    assert words in one_line(capsys, score.main, flags.format(tmp=tmp_path).split())


# ---------------------------------------------------------------------------- arguments.py

def test_table_1_is_the_papers():
    """16 GB of features for 2.8 MB of kernel at 256 x 256 x 128, 0.5 GB for 180 MB at 16."""
    out = run_script(*PYTHON, "benchmarks/arguments.py", "table1")
    assert "| 256 | 128 | 16.00 | 2.8 |" in out and "| 16 | 1024 | 0.50 | 180.0 |" in out


def test_table_1_counts_a_block_of_ours_as_by_hand():
    """H x W = 16: seven maps, and those of the embedding."""
    block = uvit.ResBlock(8, 16, 0.0, False)
    features, weights, flops = arguments.cost(
        block, torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 16))
    assert weights == 20 * (2 * (8 * 8 * 9 + 8) + 2 * 16 + 16 * 16 + 16)
    assert flops == 2 * 2 * 16 * 8 * 8 * 9 + 2 * 16 * 16
    assert 7 * 2 * 8 * 16 <= features <= 8 * 2 * 8 * 16


def write_model(file, config, model, classes):
    torch.save(dict(format=3, config=vars(config), network=config.network_settings(len(classes)),
                    classes=classes, step=1, ema=model.state_dict()), file)


def gradients_by_loop(model, size, pictures=16):
    """Of the error averaged to size x size: gradient of each picture, sum of the losses."""
    gradients, power = [], 0.0
    for n in range(pictures):
        x, cond, _ = flowers.Flowers(64, 7)[n]
        x = x / 127.5 - 1
        t, eps, _ = draw_noise(7, [n], 64, "cpu")
        logsnr = schedule.logsnr_shifted(t, 64, 32)
        alpha, sigma = schedule.alpha_sigma(logsnr)
        z = alpha * x + sigma * eps
        model.zero_grad()
        error = eps - losses.eps_from_v(z, model(z, logsnr, condition([cond.label])), alpha, sigma)
        small = error.view(1, 3, size, 64 // size, size, 64 // size).mean((3, 5))
        loss = small.square().mean()
        loss.backward()
        power += loss.item()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()
                                    if p.grad is not None]).double())
    return torch.stack(gradients), power


def test_gradient_noise_is_that_of_a_slow_loop(tmp_path, capsys):
    torch.manual_seed(0)
    config, file = train.parse_config(["--res", "64", "--model", "tiny"]), tmp_path / "model.pt"
    model = checkpoint.build_network(**config.network_settings(10))
    torch.nn.init.normal_(model.project_out.weight, std=.05)
    write_model(file, config, model, flowers.Flowers(64).classes)
    arguments.main(["gradient", "--ckpt", str(file), "--pictures", "16"])
    rows = re.findall(r"^\| (\d+) \| (.*)% \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    assert [size for size, _, _ in rows] == ["64", "32"]
    assert any("(" in batch for *_, batch in rows)

    def signal(gradients):
        variance, mean = gradients.var(0).sum(), gradients.mean(0).square().sum()
        return (mean - variance / len(gradients)) / variance

    powers = []
    for size, share, batch in rows:
        gradients, power = gradients_by_loop(model, int(size))
        powers.append(power)
        best, group = signal(gradients), torch.arange(16) % 8
        without = [signal(gradients[group != left]) for left in range(8)]
        error = (7 / 8 * sum((one - sum(without) / 8)**2 for one in without))**.5       # jackknife
        low, high = best - error, best + error
        expected = f"{1 / best:,.0f} ({1 / high:,.0f} to {1 / low:,.0f})" if low > 0 \
            else f"more than {1 / high:,.0f}"
        assert batch == expected and abs(float(share) / 100 - powers[-1] / powers[0]) < 1e-3, size


def test_gradient_noise_wants_flowers_by_class_and_whole_groups(tmp_path, capsys):
    config, file = train.parse_config(["--res", "64", "--model", "tiny"]), tmp_path / "model.pt"
    write_model(file, config, checkpoint.build_network(**config.network_settings(0)), [])
    for flags, words in ((["gradient"], "needs --ckpt"), (["decided"], "needs --ckpt"),
                         (["gradient", "--ckpt", file, "--pictures", "20"], "a multiple of 8"),
                         (["gradient", "--ckpt", file], "not trained on the flowers by class")):
        assert words in one_line(capsys, arguments.main, flags)


def test_gradient_noise_of_known_draws():
    """5 numbers of mean 0.5 and deviation 2: the squared mean is a sixteenth of the variance."""
    rng, found, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        drawn = .5 + 2 * torch.randn(8, 200, 5, generator=rng, dtype=torch.double)
        sums = drawn.sum(1)
        best, error = arguments.jackknife(sums @ sums.T, drawn.square().sum((1, 2)), 1600)
        found.append(best), errors.append(error)
    found = torch.stack(found)
    assert abs(found.mean() * 16 - 1) < .01
    assert abs(torch.stack(errors).mean() / found.std() - 1) < .1


def test_what_each_schedule_has_decided_is_read_at_its_own_logsnr(tmp_path, monkeypatch):
    """After Figure 3: cosine above, shifted below, x_hat at t = 0.8, 0.5, 0.2 and 0, of a network
    whose x_hat is grey of brightness logsnr / 20.
    """
    calls = []

    def model(z, logsnr, cond):                         # v_hat = (alpha z - x_hat) / sigma
        calls.append((cond.label.tolist(), z[:1], logsnr[:1]))
        alpha, sigma = schedule.alpha_sigma(logsnr)
        return (alpha * z - (logsnr[:, None, None, None] / 20).clamp(-1, 1)) / sigma

    saved = dict(classes=flowers.Flowers(64).classes,
                 config=vars(train.parse_config(["--res", "144", "--model", "tiny"])))
    monkeypatch.setattr(arguments, "load_model", lambda path, device: (model, saved))
    arguments.decided("model.pt", tmp_path / "decided.webp")
    labels, zs, logsnrs = zip(*calls)
    assert labels == ([4, -1],) * 400                   # seven petals, and no class: guidance
    assert torch.equal(zs[0], zs[200]) and abs(zs[0].std() - 1) < .02       # the same noise
    for z, after, logsnr_t, logsnr_s in zip(zs, zs[1:3], logsnrs, logsnrs[1:]):     # DDIM
        (alpha_t, sigma_t), (alpha_s, sigma_s) = map(schedule.alpha_sigma, (logsnr_t, logsnr_s))
        x_hat = (logsnr_t / 20).clamp(-1, 1)
        by_hand = alpha_s * x_hat + sigma_s / sigma_t * (z - alpha_t * x_hat)
        assert torch.allclose(after, by_hand, atol=1e-4)
    sheet = np.asarray(Image.open(tmp_path / "decided.webp").convert("RGB"))
    low = math.atan(math.exp(-7.5))                     # logsnr 15
    for row, shift in enumerate((0, 2 * math.log(32 / 144))):
        for column, t in enumerate((.8, .5, .2, 1 / 200)):
            pixel = sheet[26 + 148 * row + 72, 170 + 144 * column + 72]
            logsnr = -2 * math.log(math.tan(low + t * (math.pi / 2 - 2 * low))) + shift
            # Lossy: a brightness is off by up to 2 of 255.
            assert np.abs(pixel / 127.5 - 1 - logsnr / 20).max() < .02, (row, t, pixel)


# ---------------------------------------------------------------------------- ablations.py

def settings(**changes):
    """What the table's functions read of the command line."""
    return argparse.Namespace(**dict(model="tiny", batch=2, lr=1e-3, steps=2, samples=10,
                                     sample_steps=10) | changes)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Where ablations.py writes its tables, in place of docs/results.md."""
    monkeypatch.setattr(ablations, "PICTURES", tmp_path)
    monkeypatch.setattr(ablations, "PAGE", tmp_path / "results.md")
    ablations.PAGE.write_text("# Results\n\nbefore\n")
    return ablations.PAGE


def mean_and_deviation(a, b, sign=""):
    return f"{np.mean([a, b]):{sign}.4f} ± {abs(a - b) / 2**.5:.4f}"


def test_ablations_train_score_and_write_a_table_and_go_on(tmp_path, page, capfd):
    runs = tmp_path / "runs"
    flags = [*"--finding multiscale --sizes 32 --steps 2 --batch 2 --seeds 2 --samples 10 "
             "--sample-steps 10 --out".split(), str(runs)]
    ablations.main(flags)
    assert "step/s" not in capfd.readouterr().err       # bars of several rows would be mixed up
    text = page.read_text()
    off, on = ([json.loads((runs / f"multiscale-tiny-32-{name}-2x2-{seed}/scores.json").read_text())
                for seed in (0, 1)] for name in ("off", "on"))
    structure = [scores["structure"] for scores in on]
    first_cell = f"| 32 | on | {mean_and_deviation(*structure)} |"
    assert first_cell in text and text.startswith("# Results\n\nbefore\n")
    gaps = [a["structure"] - b["structure"] for a, b in zip(off, on)]
    assert f"| 32 | on | {mean_and_deviation(*gaps, sign='+')} |" in text
    small, full = np.mean([scores["errors"] for scores in on], 0)
    cells = f"{small[0]:.3f} ({full[0]:.3f}) | {small[1]:.3f} ({full[1]:.3f})"
    assert f"| 32 | on | {cells} |" in text
    gap = np.mean([a["errors"][0][0] - b["errors"][0][0] for a, b in zip(off, on)])
    assert f"| 32 | on: less than off by | {gap:+.3f} ± " in text
    name = "multiscale-tiny-32-2x2-2-seeds.webp"
    assert Image.open(tmp_path / name).size[0] > 720 and f"](../benchmarks/{name})" in text

    files = [file for file in runs.rglob("*.*") if file.suffix in (".pt", ".json")]
    times = lambda: [file.stat().st_mtime_ns for file in files]
    before = times()
    ablations.main(flags)
    assert times() == before and page.read_text() == text
    ablations.main([*flags, "--rows", "on"])            # a table and a picture more
    after = page.read_text()
    added = after.removeprefix(text.rstrip())
    assert len(added) < len(after) and first_cell in added and "off" not in added
    assert Image.open(tmp_path / "multiscale-tiny-32-on-2x2-2-seeds.webp")
    ablations.main([*flags, "--rows", "on", "off"])     # the finding's order
    assert page.read_text() == after


def put_scores(args, scores):
    """{(size, row): a number per seed, in place of every score} -> the files of their runs."""
    for (res, name), numbers in scores.items():
        for seed, number in enumerate(numbers):
            out = ablations.folder("blocks", res, name, seed, args)
            out.mkdir(parents=True)
            errors = [[number] * 5, [2 * number] * 5]   # averaged, and as it is
            scores = dict.fromkeys(ablations.METRICS, number) | dict(errors=errors)
            (out / "scores.json").write_text(json.dumps(scores))


def test_ablations_gaps_and_how_they_grow_are_seed_by_seed(tmp_path):
    args = settings(out=tmp_path)
    put_scores(args, {                                  # gaps:
        (16, "1"): [1, 2, 3], (16, "8"): [8, 9, 10],    # -7, -7, -7
        (24, "1"): [5, 7, 6], (24, "8"): [4, 2, 2],     # 1, 5, 4
        (32, "1"): [9, 9, 9], (32, "8"): [7, 5, 0]})    # 2, 4, 9

    def tables(sizes, seeds):
        args.seeds = seeds
        speeds = {(res, name): [1] for res in sizes for name in ("1", "8")}
        page = ablations.table("blocks", sizes, ["1", "8"], args, speeds)
        page = page[page.index("Gaps: 1 less the row"):]
        at = page.index("Rms error of x_hat")
        return page[:at], page[at:]

    gaps, levels = tables([16, 24, 32], 3)
    for row in ("16 | 8 | -7.0000 ± 0.0000", "24 | 8 | +3.3333 ± 2.0817",
                "32 | 8 | +5.0000 ± 3.6056", "16 to 24 | 8 | +10.3333 ± 2.0817",
                "16 to 32 | 8 | +12.0000 ± 3.6056",
                "24 to 32 | 8 | +1.6667 ± 3.0551"):     # of 1, -1 and 5
        assert f"| {row} |" in gaps, row
    for row in ("24 | 8 | 2.667 (5.333)",
                "24 | 8: less than 1 by | +3.333 ± 2.082 (+6.667 ± 4.163)",
                "24 to 32 | 8: less than 1 by | +1.667 ± 3.055 (+3.333 ± 6.110)"):
        assert f"| {row} |" in levels, row
    # t of two degrees of freedom, 4.303, over the root of 3; of one, 12.706, over that of 2.
    assert "significant from 2.48 standard deviations on" in gaps
    assert '"16 to 24" is the gap at 24 less that at 16.' in " ".join(gaps.split())
    assert " to " not in tables([24], 3)[0]
    assert "significant from 8.98 standard deviations on" in tables([24], 2)[0]
    gaps, levels = tables([24], 1)
    assert "| 24 | 8 | +1.0000 |" in gaps and "significant" not in gaps
    assert "less than" not in levels


def test_ablations_caption_gives_the_settings_of_the_runs(tmp_path):
    args = settings(out=tmp_path, steps=1500, batch=16, seeds=3, samples=200, sample_steps=64)
    assert ablations.caption("dropout", args).splitlines() == [
        "*Dropout helps, most from 64 down and nearly as much from 16 down (Section 3.4). Here on "
        "256 pictures.*",
        "`tiny`, 1,500 steps of 16 pictures, learning rate 0.001, seeds 0 to 2."]
    args.seeds, args.samples = 1, 50
    assert ablations.caption("blocks", args).endswith(
        "learning rate 0.001, seed 0. 50 samples, 64 steps each.")


@pytest.fixture
def logs(monkeypatch):
    """In place of training: logs of rows "1" and "8", the second half as fast, slower each time."""
    made = argparse.Namespace(turns=[], lines=4)

    def fit(finding, res, name, seed, args, steps, out):
        made.turns.append((finding, res, name, steps))
        speed = {"1": 10, "8": 5}[name] / len(made.turns)
        lines = [dict(step=20, images_per_second=1), dict(step=40, images_per_second=speed),
                 dict(step=40, loss_by_noise_level=[1]), dict(step=60, images_per_second=3 * speed)]
        text = "".join(json.dumps(line) + "\n" for line in lines[:made.lines])
        (out / "log.jsonl").write_text(text)

    monkeypatch.setattr(ablations, "fit", fit)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(run, "FIRST_REPORT", 50)        # put back afterwards
    made.pools = []

    def pool(count, _, **options):
        made.pools.append((count, options))
        return contextlib.nullcontext(argparse.Namespace(map=map))

    monkeypatch.setattr(ablations, "ProcessPoolExecutor", pool)
    return made


def test_ablations_speed_is_over_that_of_the_first_row(tmp_path, logs):
    args, rows, sizes = settings(seeds=3, out=tmp_path / "runs"), ["1", "8"], [16, 24]
    assert ablations.pace("blocks", 16, "1", args) == 20
    assert run.FIRST_REPORT == 0                        # no checkpoint while time is taken
    logs.turns.clear()
    found = ablations.paces("blocks", sizes, rows, args, rounds=2)
    assert logs.turns == [("blocks", res, name, 60)
                          for _ in range(2) for res in sizes for name in rows]
    assert found[16, "1"] == found[24, "1"] == [1, 1]
    assert found[16, "8"] == pytest.approx([1 / 4, 5 / 12])
    assert found[24, "8"] == pytest.approx([3 / 8, 7 / 16])
    assert logs.pools == [(1, dict(max_tasks_per_child=1))]     # one at a time, each in a process
    logs.lines = 2                                              # stopped
    with pytest.raises(KeyboardInterrupt):
        ablations.pace("blocks", 16, "1", args)
    put_scores(args, {(16, "1"): [1, 2, 3], (16, "8"): [8, 9, 10]})
    page = ablations.table("blocks", [16], rows, args,
                           {(16, "1"): [1, 1, 1], (16, "8"): [.5, .6, .7]})
    assert "| 9.00 ± 1.00 | 0.60 ± 0.10 |" in page and "| 2.00 ± 1.00 | 1.00 ± 0.00 |" in page


def test_ablations_page_has_the_speed_and_survives_a_full_disk(
        tmp_path, logs, page, monkeypatch, capsys):
    out = tmp_path / "runs"
    put_scores(settings(out=out), {(16, "1"): [1, 2, 3], (16, "8"): [8, 9, 10]})
    monkeypatch.setattr(ablations, "cell", lambda *row: None)
    monkeypatch.setattr(ablations, "pictures", lambda *row: "")
    flags = [*"--finding blocks --sizes 16 --rows 1 8 --steps 2 --batch 2 --samples 10 "
             "--sample-steps 10 --out".split(), str(out)]
    ablations.main(flags)
    speeds = [1 / 4, 3 / 8, 5 / 12]                             # three rounds
    cell = f"{np.mean(speeds):.2f} ± {np.std(speeds, ddof=1):.2f}"
    text = page.read_text()
    assert f"| 9.00 ± 1.00 | {cell} |" in text

    def full(*file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ablations, "write", full)               # only the page is left to write
    assert "No space left on device; once that" in one_line_after(capsys, flags)
    assert page.read_text() == text


def one_line_after(capsys, flags):
    """ablations.main, which prints its tables and then ends with a line -> the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ablations.main(flags)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_ablations_that_cannot_run_end_with_a_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    error = lambda *flags: one_line(capsys, ablations.main, ["--finding", *flags])
    assert "file/runs: Not a directory" in error("dropout", "--out", tmp_path / "file/runs")
    assert "invalid choice" in error("dropout", "--model", "huge")
    assert "of 'off', 'on'" in error("multiscale", "--rows", "half")
    for flag in "--jobs", "--seeds":
        assert "--seeds and --jobs at least 1" in error("multiscale", flag, "0")


def test_ablations_error_is_that_of_a_known_network():
    """x_hat = 0: the error is the picture, at any noise; averaged, the averaged picture. x_hat = x:
    none. x_hat = 7: that of 1, since it is clipped as in sampling.
    """
    fresh = flowers.Flowers(72, seed=1_000_003)
    x, levels = torch.stack([fresh[n][0] for n in range(16)]) / 127.5 - 1, []
    rms = lambda error: error.square().mean().sqrt()

    def model(x_hat):
        def v_hat(z, logsnr, cond):                             # (alpha z - x_hat) / sigma
            alpha, sigma = schedule.alpha_sigma(logsnr)
            levels.append((logsnr[0] + 2 * math.log(2)).item())
            return (alpha * z - x_hat) / sigma
        return v_hat

    small, full = ablations.validate(model(0), 72, 16)
    assert np.allclose(full, rms(x), atol=1e-5)
    assert np.allclose(small, rms(F.avg_pool2d(x, 2)), atol=1e-5)
    assert np.allclose(levels, [-4, -2, 0, 2, 4], atol=1e-5)
    assert np.allclose(ablations.validate(model(x), 72, 16), 0, atol=1e-5)
    assert np.allclose(ablations.validate(model(7), 72, 16)[1], rms(1 - x), atol=1e-4)
    mine = [(fresh[n][0] // 2, uvit.Condition(0, 0, []), {}) for n in range(16)]
    full = ablations.validate(model(0), 72, 16, pictures=mine)[1]
    halves = torch.stack([picture for picture, *_ in mine]) / 127.5 - 1
    assert np.allclose(full, rms(halves), atol=1e-5)


def test_ablations_score_structure_without_what_averaging_takes_away():
    x, petals, _ = score.real(20, 72)
    sign = torch.tensor([[1., -1.], [1., -1.]]).repeat(36, 36)
    clean, grainy = (ablations.scored(pictures, 72) for pictures in (x, x + .2 * sign))
    assert (clean["petals"] == petals).float().mean() >= .9
    truth = score.real(500, 72, seed=1_000_005)[0]
    small, small_truth = (F.avg_pool2d(pictures, 2) for pictures in (x, truth))
    assert clean["distance"] == pytest.approx(score.compare(small, small_truth)["distance"])
    sides = {36: 36, 64: 32, 72: 36, 128: 32, 144: 36, 288: 36, 576: 36}
    for res, side in sides.items():
        assert ablations.structure(torch.zeros(1, 3, res, res)).shape[-1] == side
    for name in ("petals", "asymmetry", "axes"):
        assert torch.allclose(clean[name].float(), grainy[name].float(), atol=1e-3), name
    assert abs(clean["distance"] - grainy["distance"]) < 1e-3
    assert clean["detail"] < 2 < 10 < grainy["detail"]


def test_ablations_changes_are_what_their_names_say(monkeypatch):
    for module, name in ((checkpoint, "UViT"), (train, "logsnr_schedule")):
        monkeypatch.setattr(module, name, getattr(module, name))        # put back afterwards
    ablations.predict_eps()
    network = train.parse_config(["--res", "64", "--model", "tiny"]).network_settings(10)
    torch.manual_seed(0)
    model = checkpoint.build_network(**network)
    torch.nn.init.normal_(model.project_out.weight)
    plain = uvit.UViT(64, **uvit.PRESETS["tiny"]["network"], classes=10)
    plain.load_state_dict(model.state_dict())
    z, logsnr, cond = torch.randn(2, 3, 64, 64), torch.tensor([-6., 4.]), condition([1, 2])
    v_hat, out = model(z, logsnr, cond), plain(z, logsnr, cond)
    eps = losses.eps_from_v(z, v_hat, *schedule.alpha_sigma(logsnr))
    assert torch.allclose(eps, out, atol=1e-4) and not torch.allclose(eps, v_hat, atol=.1)

    ablations.train_on_elbo()
    shift = 2 * math.log(2)
    logsnr = train.logsnr_schedule("shifted", 64, 32)(torch.tensor([0., .25, 1.]))
    assert torch.allclose(logsnr, torch.tensor([15., 7.5, -15.]) - shift, atol=1e-5)
    sampled = ablations.logsnr_schedule("shifted", 64, 32)(torch.tensor([.5]))      # as before
    assert torch.allclose(sampled, torch.tensor([-shift]), atol=1e-5)


def test_ablations_changes_of_a_finding_reach_the_trainer(tmp_path, monkeypatch):
    """Schedule, loss, levels of the wavelet, and every level as wide as it has channels."""
    configs = []
    monkeypatch.setattr(train, "main", lambda argv: configs.append(train.parse_config(argv)))
    monkeypatch.setattr(run, "tqdm", run.tqdm)                          # put back afterwards
    args = settings(batch=4, out=tmp_path)

    def fit(finding, res, row):
        presets = {name: dict(network=dict(preset["network"]), training=preset["training"])
                   for name, preset in original.items()}
        monkeypatch.setattr(uvit, "PRESETS", presets)
        monkeypatch.setattr(config_module, "PRESETS", presets)
        ablations.fit(finding, res, row, 3, args, 7, tmp_path / row / "run")
        return configs[-1]

    original = uvit.PRESETS
    config = fit("schedule", 512, "cosine")             # at 512 it would be on by itself
    assert (config.schedule, config.multiscale) == ("cosine", False)
    assert vars(config).items() >= dict(res=512, steps=7, seed=3, batch=4, lr=1e-3, warmup=100,
                                        accum=1, sample_every=0, model="tiny").items()
    assert [fit("schedule", 64, row).noise_d for row in ("shifted, 64", "shifted, 32")] == [64, 32]
    for row in ("off", "on"):
        config = fit("multiscale", 512, row)
        assert (config.schedule, config.multiscale) == ("shifted", row == "on")
    network = fit("schedule", 288, "cosine").network_settings(0)       # two levels of wavelet
    assert network["widths"] == (48, 48, 48, 128)
    config = fit("dropout", 72, "from 36")
    assert (config.dropout, config.dropout_res, config.flip) == (.2, 36, False)
    assert config.data == str(tmp_path / "few-72")

    rows = {        # levels; channels of the first map; blocks of the transformer
        "none": (0, 16, 4), "DWT-1": (1, 24, 6), "DWT-2": (2, 96, 8),
        "conv 2 x 2": (1, 24, 6), "conv 4 x 4": (2, 96, 8)}
    for res in (144, 256):
        for row, expected in rows.items():
            model = checkpoint.build_network(**fit("patch", res, row).network_settings(0))
            first = model.project_in
            levels = model.wavelet_levels or int(math.log2(first.stride[0]))
            assert (levels, first.out_channels, len(model.transformer)) == expected, (res, row)
            assert all(pool[1].in_channels >= 3 * 4**levels for pool in model.pool)
    assert run.tqdm is ablations.NoBar and ablations.NoBar(range(3), disable=False).disable


def test_ablations_few_pictures_are_256_flowers_by_class(tmp_path):
    folder = ablations.few_pictures(tmp_path / "few", 24)
    few = data.Pictures(folder, 24)
    assert len(few.names) == 256 and few.classes == [f"{k:02d} petals" for k in range(3, 13)]
    assert not list(Path(folder).rglob("*.part"))


# ---------------------------------------------------------------------------- samplers.py

def test_spacings_of_sampling_steps_are_even_in_what_they_are_named_after():
    u, cosine = torch.linspace(1, 0, 9, dtype=torch.float64), schedule.logsnr_cosine
    assert torch.equal(samplers.spaced(cosine, "t", 64)(u), cosine(u))
    assert torch.equal(samplers.spaced(cosine, "t^2", 64)(u), cosine(u**2))
    root = lambda logsnr: torch.exp(-logsnr / 2) ** (1 / 7)
    ratio = {"logsnr": (-15, lambda logsnr: logsnr),        # of these, all differences are equal
             "karras7": (-15, root), "karras7@-2": (-2 - math.log(64**2), root),
             "asinh": (-2.3 - math.log(64**2), lambda x: torch.asinh((x + math.log(4)) / 3))}
    for name, (first, even) in ratio.items():
        logsnr = samplers.spaced(cosine, name, 64)(u)
        assert abs(logsnr[0] - first) < 1e-4 and abs(logsnr[-1] - samplers.END) < 1e-4
        steps = even(logsnr).diff()
        assert (steps / steps.mean() - 1).abs().max() < 1e-4, name


def test_a_row_of_samplers_counts_calls_and_scores(tmp_path, trained_run, monkeypatch):
    calls, drawn, pictures = [], [], []
    honest, noise = samplers.sample, samplers.picture_noise
    monkeypatch.setattr(samplers, "picture_noise", lambda *args: drawn.append(args) or noise(*args))
    monkeypatch.setattr(samplers, "sample", lambda *args: calls.append(args[1:]) or
                        pictures.append(honest(*args)) or pictures[-1])
    monkeypatch.setattr(samplers.score, "TRUTH", 20)
    command = ["--ckpt", str(trained_run / "model.pt"), "--n", "30", "--guidance", "1",
               "--rows", "ancestral0.2 t 2", "dpm t^2 3", "--out", str(tmp_path / "table.md")]
    monkeypatch.setattr(sys, "argv", ["samplers.py", *command])
    samplers.main()
    # Batches of 20 and 10; of a call: schedule, noise, steps, cond, sampler, gamma, guidance.
    assert [(args[2], len(args[3].label), *args[4:]) for args in calls] == [
        (2, 20, "ancestral", .2, 1), (2, 10, "ancestral", .2, 1),
        (3, 20, "dpm", 0, 1), (3, 10, "dpm", 0, 1)]
    u, trained = torch.tensor([.5]), schedule.logsnr_shifted
    assert torch.equal(calls[0][0](u), trained(u, 32)) \
        and torch.equal(calls[2][0](u), trained(u**2, 32))
    assert drawn == [(1, n, 32, "cpu") for n in (range(20), range(20, 30))] * 2
    rows = [line.split(" | ") for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [row[0] for row in rows] == ["| ancestral0.2 t 2", "| dpm t^2 3"]
    assert all(row[2] == "30" and 0 <= float(row[3].rstrip("%")) <= 100 for row in rows)
    assert calls[0][3].label.tolist() == [*range(10)] * 2
    first, second = (torch.cat(pictures[i:i + 2]) for i in (0, 2))
    off = (first - second).square().mean().sqrt().item()
    assert rows[0][-1] == "0.000 |" and abs(float(rows[1][-1].rstrip(" |")) - off) < .002
    found = {"petals": torch.tensor([12, 5, 12]), "asymmetry": torch.zeros(3)}
    monkeypatch.setattr(samplers.score, "score", lambda x: found)
    monkeypatch.setattr(sys, "argv", ["samplers.py", *command, "--n", "3", "--rows", "sde asinh 1",
                                      "--petals", "12", "5"])
    samplers.main()
    assert calls[-1][3].label.tolist() == [9, 2, 9] and calls[-1][4] == "sde"
    assert (tmp_path / "table.md").read_text().splitlines()[-1].split(" | ")[3] == "100.0%"


# ---------------------------------------------------------------------------- mutants.py

def test_each_mutant_is_of_code_that_still_stands():
    """benchmarks/mutants.py stops at the first that it cannot find."""
    texts = {}
    for rows in mutants.LISTS.values():
        for file, old, *_ in rows:
            text = texts.setdefault(file, (HERE / file).read_text("utf-8"))
            assert text.count(old) == 1, (file, old)


def test_number_of_mutants_is_what_the_readme_says():
    count = sum(map(len, mutants.LISTS.values()))
    assert f"- {count} errors, planted" in " ".join((HERE / "README.md").read_text().split())


# ---------------------------------------------------------------------------- scale.py

def test_simulated_ranks_agree_and_one_that_does_not_is_found(capsys, monkeypatch):
    class InTurn:                               # in this process, so that it can be disturbed
        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def starmap(self, function, work, chunk):
            return [function(*args) for args in work]
    monkeypatch.setattr(scale.multiprocessing, "get_context", lambda kind: SimpleNamespace(
        Pool=InTurn))
    scale.main(["--pictures", "700", "--ranks", "4"])
    assert "4 ranks: the same two permutations" in capsys.readouterr().out
    honest = scale.draw_noise
    monkeypatch.setattr(scale, "draw_noise", lambda seed, numbers, *more: honest(
        seed + (512 < numbers[0] <= 640), numbers, *more))
    with pytest.raises(SystemExit) as stop:
        scale.main(["--pictures", "700", "--ranks", "4"])
    assert re.match(r"picture 5\d\d is \('n0.*JPEG', '.*'\), by one rank \('n0", stop.value.code)


# ---------------------------------------------------------------------------- gpu.py

def test_parts_of_gpu_py_run_in_turn_until_the_time_is_up(tmp_path):
    def gpu(*arguments, code=0):
        return run_script(*PYTHON, "benchmarks/gpu.py", "--out", tmp_path / "gpu.md", *arguments,
                          code=code)
    said = gpu("noise", "load")
    assert (tmp_path / "gpu.md").read_text() in said
    assert re.search(r"\| 4 of 64 x 64, at once \| [\d.]+ \| [\d.]+ \| [\d.]+ \(", said)
    assert "from the CPU's noise: 0.0e+00" in said and re.search(r"\| 64 \| 1 \| \d+ \|", said)
    assert said.index("(noise: ") < said.index("### Loading") < said.index("(load: ")
    assert "exit code" not in said
    said = gpu("load", "noise", "--minutes", ".02")             # a second: killed, and none left
    assert "exit code -9" in said and "(no time for noise)" in said
    assert "parts are base, command" in gpu("speed", code=2)
