"""benchmarks/: scores, ablations, mutants."""
import argparse
import contextlib
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import loss as losses
import sample as sampling
import schedule
import train
import uvit
from test_all import HERE, PYTHON, one_line, run_script


def test_score_reads_petals_and_colour_of_real_flowers_and_sees_what_is_wrong():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    x, petals, colour = score.real(100, 64)
    found = score.score(x)
    assert (found["petals"] == petals).float().mean() >= .99 and np.mean([a == b for a, b in zip(found["colour"], colour)]) >= .99
    squeezed = score.score(F.interpolate(x[:40], (64, 80), mode="bilinear"))
    assert abs(squeezed["axes"].median() - .8) < .02 and score.summary(squeezed).endswith("| 0% |")
    half = x[:40].clone()
    half[:, :, :28] = half[:, :, :28].flip(2)                                   # one half of the flower upside down
    assert score.score(half)["asymmetry"].median() > 1.5 * found["asymmetry"].median()


def test_petals_are_counted_though_one_is_missing():
    """A ninth of a turn painted over with ground: the others still repeat as often."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    x, petals, _ = score.real(120, 56, seed=9)
    side = torch.linspace(-1, 1, 56)
    gone = torch.where(torch.atan2(side[:, None], side).abs() < math.pi / 9, x[:, :, :1, :1], x)
    assert (score.find(gone)[1] == petals).float().mean() > .95


def test_other_numbers_than_real_flowers_have_are_read_as_such(monkeypatch):
    """Two lobes are not three petals, and thirteen or fourteen are not twelve."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    monkeypatch.setattr(data, "NUMBERS", [*data.NUMBERS, "thirteen", "fourteen", "two"])        # for the captions
    petals = torch.tensor(20 * [2, 13, 14])
    x = np.stack([data.draw_flower(np.random.default_rng((6, i)), int(k), 64)[0] for i, k in enumerate(petals)])
    found = score.score(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert (found["petals"] == petals).float().mean() >= .95 and found["asymmetry"].median() < .5


def test_score_asks_for_200_new_flowers_and_says_how_often_pictures_are_what_prompts_say(tmp_path, capsys, monkeypatch):
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    assert (score.REAL, score.TRUTH) == (200, 500)
    monkeypatch.setattr(score, "REAL", 20)
    monkeypatch.setattr(score, "TRUTH", 50)
    assert score.asked("A blue flower with eleven petals on cream") == ("blue", 11) and score.asked("a flower, 7 petals") == (None, 7)
    assert score.asked("a red one") == ("red", None) and score.asked("three petals")[1] == 3 and score.asked("12 petals")[1] == 12
    score.main(["--new", str(tmp_path / "prompts")])
    prompts = (tmp_path / "prompts").read_text().splitlines()
    pairs = [score.asked(prompt) for prompt in prompts]
    assert len(prompts) == 200 and len(set(prompts)) > 150 and len(set(pairs)) == 20 and all(data.never_shown(*pair) for pair in pairs)
    for i, (colour, k) in enumerate([("red", 8), ("white", 5), ("red", 8), ("blue", 9)]):
        picture, _ = data.draw_flower(np.random.default_rng(i), k, 48, [colour])
        Image.fromarray((picture * 255).astype(np.uint8)).save(tmp_path / f"{i:06d}.png")
    (tmp_path / "asked").write_text("a red flower with 8 petals\n\na white flower with six petals\n")        # in turns; of four one wrong colour, two wrong numbers
    score.main([str(tmp_path), "--prompts", str(tmp_path / "asked")])
    said = capsys.readouterr().out
    assert f"| {tmp_path} | 4 | 50.0% | 75.0% |" in said and "number of petals: 6 0%, 8 100%\n" in said and "by colour: red 100%, white 50%\n" in said
    for i, k in enumerate((3, 5, 5, 6)):                                        # of 3, 4, 5, 6
        picture, _ = data.draw_flower(np.random.default_rng(i), k, 48)
        Image.fromarray((picture * 255).astype(np.uint8)).save(tmp_path / f"{i:06d}.png")
    score.main([str(tmp_path), "--classes"])
    said = capsys.readouterr().out
    assert f"| {tmp_path} | 4 | 75.0% | |" in said.replace("  ", " ") and "petals: 3 100%, 4 0%, 5 100%, 6 100%\n" in said and "by colour" not in said
    assert "| real flowers | 20 |" in said
    for i in range(21):                                                        # as many real flowers as samples, if that is more
        Image.fromarray((picture * 255).astype(np.uint8)).save(tmp_path / f"{i:06d}.png")
    score.main([str(tmp_path)])
    assert "| real flowers | 21 |" in capsys.readouterr().out
    assert "not allowed with" in one_line(capsys, score.main, ["--classes", "--prompts", "x"])


def test_detail_and_distance_see_blur_broken_structure_and_wrong_colours():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    truth, y = score.real(300, 64, seed=7)[0], score.real(150, 64)[0]
    half = y.clone()
    half[:, :, :28] = half[:, :, :28].flip(2)
    found = {name: score.compare(x, truth) for name, x in dict(real=y, half=half, swapped=y[:, [0, 2, 1]], blurred=F.avg_pool2d(y, 3, 1, 1)).items()}
    assert abs(found["real"]["detail"] - 1) < .15 and found["blurred"]["detail"] < .2
    assert all(found[name]["distance"] > 2 * found["real"]["distance"] for name in ("half", "swapped", "blurred")), found


def test_distance_on_trained_features_sees_blur_and_says_what_is_missing(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    for i, picture in enumerate(score.real(2, 32)[0]):
        Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(tmp_path / f"{i:06d}.png")
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        assert "--efficientnet: " in one_line(capsys, score.main, [tmp_path, "--efficientnet"])
    pytest.importorskip("efficientnet_lite_pytorch")
    truth, y = score.real(60, 32, seed=7)[0], score.real(40, 32)[0]
    blurred = score.compare(F.avg_pool2d(y, 5, 1, 2), truth, trained=True)["distance"]
    assert blurred > 1.5 * score.compare(y, truth, trained=True)["distance"]


def test_octaves_are_those_of_waves_and_the_distance_that_of_gaussians():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    for k, period in enumerate((3, 6, 12, 24)):                                 # pixels; an octave is from period 2 2^k to 4 2^k
        wave = torch.cos(2 * math.pi * torch.arange(96) / period).expand(1, 3, 96, 96)
        assert score.octaves(wave)[0].argmax() == k and score.octaves(wave.mT)[0].argmax() == k
    a, b = torch.randn(4000, 3, dtype=torch.double), torch.randn(4000, 3, dtype=torch.double)
    scale, shift = torch.tensor([1., 2., 3.]), torch.tensor([0., 1., 0.])
    exact = (shift.square() + (scale - 1).square()).sum() / 3                   # |mu|^2 + sum of (s_a - s_b)^2, over tr B
    assert abs(score.frechet(a * scale + shift, b) - exact) < .1 and score.frechet(b, b) < 1e-6
    for count in (1, 2, 201):                                                   # copies of one picture, or fewer than features: no spread to compare
        copies = a[:1].expand(count, -1)
        exact = ((a[0] - b.mean(0)).square().sum() + b.var(0).sum()) / b.var(0).sum()
        assert math.isclose(score.frechet(copies, b), exact, rel_tol=1e-9) and math.isclose(score.frechet(copies, torch.cat([b, b[:5]])), exact, rel_tol=.01)
    few, wide = torch.randn(7, 40, dtype=torch.double), torch.randn(9, 40, dtype=torch.double)      # singular covariances: by symmetric roots
    root = lambda matrix: (lambda spread, axes: axes * spread.clamp(min=0).sqrt() @ axes.T)(*torch.linalg.eigh(matrix))
    A, B = torch.cov(few.T), torch.cov(wide.T)
    exact = ((few.mean(0) - wide.mean(0)).square().sum() + A.trace() + B.trace() - 2 * root(root(B) @ A @ root(B)).trace()) / B.trace()
    assert math.isclose(score.frechet(few, wide), exact, rel_tol=1e-6) and abs(score.frechet(few, few)) < 1e-12
    turned = torch.linalg.qr(torch.randn(3, 3, dtype=torch.double))[0] * torch.tensor([.1, 1., 10.])
    assert abs(score.frechet(*score.whiten(a @ turned, b @ turned)) - score.frechet(*score.whiten(a, b))) < 1e-6


def test_table_1_is_the_papers():
    """16 GB of features for 2.8 MB of kernel at 256 x 256 x 128, 0.5 GB for 180 MB at 16 x 16 x 1024."""
    said = run_script(*PYTHON, "benchmarks/arguments.py", "table1")
    assert "| 256 | 128 | 16.00 | 2.8 |" in said and "| 16 | 1024 | 0.50 | 180.0 |" in said
    block = uvit.ResBlock(8, 16, 0.0, False)                                    # by hand, H x W = 16: seven maps and the embedding's
    sys.path.insert(0, str(HERE / "benchmarks"))
    import arguments
    features, weights, flops = arguments.cost(block, torch.randn(1, 8, 4, 4, requires_grad=True), torch.randn(1, 16))
    assert weights == 20 * (2 * (8 * 8 * 9 + 8) + 2 * 16 + 16 * 16 + 16) and flops == 2 * 2 * 16 * 8 * 8 * 9 + 2 * 16 * 16
    assert 7 * 2 * 8 * 16 <= features <= 8 * 2 * 8 * 16


def test_gradient_noise_is_that_of_a_slow_loop(tmp_path, capsys):
    sys.path.insert(0, str(HERE / "benchmarks"))
    import arguments
    torch.manual_seed(0)
    config = vars(train.parse_config(["--res", "64"]))
    model = sampling.network(config, 10)
    torch.nn.init.normal_(model.project_out.weight, std=.05)
    torch.save(dict(format=2, config=config, classes=data.Flowers(64).classes, step=1, ema=model.state_dict()), tmp_path / "model.pt")
    arguments.main(["gradient", "--ckpt", str(tmp_path / "model.pt"), "--pictures", "16"])
    said = re.findall(r"^\| (\d+) \| (.*)% \| (.*) \|$", capsys.readouterr().out, re.MULTILINE)
    assert any("(" in ratio for *_, ratio in said)
    logsnr, powers = schedule.logsnr_schedule("shifted", 64), []
    assert [size for size, _, _ in said] == ["64", "32"]

    def signal(gradients):
        variance, mean = gradients.var(0).sum(), gradients.mean(0).square().sum()
        return (mean - variance / len(gradients)) / variance

    for size, share, ratio in said:
        gradients, size = [], int(size)
        powers.append(0.0)
        for n in range(16):
            x, label, _ = data.Flowers(64, 7)[n]
            t, eps, _ = train.draw_noise(7, n, 1, 64, "cpu")
            alpha, sigma = schedule.alpha_sigma(logsnr(t))
            model.zero_grad()
            error = eps - losses.eps_from_v(alpha * x + sigma * eps, model(alpha * x + sigma * eps, logsnr(t), label[None]), alpha, sigma)
            loss = error.view(1, 3, size, 64 // size, size, 64 // size).mean((3, 5)).square().mean()
            loss.backward()
            powers[-1] += loss.item()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double())
        gradients = torch.stack(gradients)
        best, without = signal(gradients), [signal(gradients[torch.arange(16) % 8 != left]) for left in range(8)]
        error = (7 / 8 * sum((one - sum(without) / 8)**2 for one in without))**.5        # jackknife
        expected = f"{1 / best:,.0f} ({1 / (best + error):,.0f} to {1 / (best - error):,.0f})" if best > error else f"more than {1 / (best + error):,.0f}"
        assert ratio == expected and abs(float(share) / 100 - powers[-1] / powers[0]) < 1e-3, size
    torch.save(dict(format=2, config=config, classes=[], step=1, ema=sampling.network(config, 0).state_dict()), tmp_path / "model.pt")
    assert "needs --ckpt" in one_line(capsys, arguments.main, ["gradient"])
    assert "a multiple of 8" in one_line(capsys, arguments.main, ["gradient", "--ckpt", str(tmp_path / "model.pt"), "--pictures", "20"])
    assert "was not trained on the flowers by class" in one_line(capsys, arguments.main, ["gradient", "--ckpt", str(tmp_path / "model.pt")])


def test_what_each_schedule_has_decided_is_read_at_its_own_logsnr(tmp_path, monkeypatch, capsys):
    """After Figure 3: cosine above, shifted below, x_hat at t = 0.8, 0.5, 0.2 and 0 of a network that paints its clock."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    import arguments
    asked, seen = [], []

    def clock(z, logsnr, label):                        # x_hat = logsnr / 20, v_hat = (alpha z - x_hat) / sigma
        asked.append(label.tolist())
        seen.append((z[:1], logsnr[:1]))
        alpha, sigma = schedule.alpha_sigma(logsnr)
        return (alpha * z - (logsnr[:, None, None, None] / 20).clamp(-1, 1)) / sigma

    clock.classes = 10
    saved = dict(classes=data.Flowers(64).classes, config=vars(train.parse_config(["--res", "144"])))
    monkeypatch.setattr(arguments, "load_model", lambda path, device: (clock, saved))
    arguments.decided("model.pt", tmp_path / "decided.png")
    assert asked == [[4, 10]] * 400                     # seven petals, and no class: guided
    assert torch.equal(seen[0][0], seen[200][0]) and abs(seen[0][0].std() - 1) < .02        # the same noise
    for (z, clock_t), (after, clock_s) in zip(seen[:3], seen[1:]):                          # and no more of it: DDIM
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(clock_t), schedule.alpha_sigma(clock_s)
        x_hat = (clock_t / 20).clamp(-1, 1)
        assert torch.allclose(after, alpha_s * x_hat + sigma_s / sigma_t * (z - alpha_t * x_hat), atol=1e-4)
    sheet = np.asarray(Image.open(tmp_path / "decided.png").convert("RGB"))
    for row, shift in enumerate((0, 2 * math.log(32 / 144))):
        for column, t in enumerate((.8, .5, .2, 1 / 200)):
            painted = sheet[26 + 148 * row + 72, 170 + 144 * column + 72]
            clipped = math.atan(math.exp(-7.5))         # logsnr 15
            wanted = (-2 * math.log(math.tan(clipped + t * (math.pi / 2 - 2 * clipped))) + shift) / 20
            assert np.abs(painted / 127.5 - 1 - wanted).max() < .006, (row, t, painted / 127.5 - 1, wanted)
    assert "needs --ckpt" in one_line(capsys, arguments.main, ["decided"])


def test_gradient_noise_of_known_draws():
    """Gradients of 5 numbers, mean 0.5 and deviation 2: the squared mean is a sixteenth of the variance."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    import arguments
    rng, found, errors = torch.Generator().manual_seed(0), [], []
    for _ in range(400):
        drawn = .5 + 2 * torch.randn(8, 200, 5, generator=rng, dtype=torch.double)
        sums = drawn.sum(1)
        best, error = arguments.jackknife(sums @ sums.T, drawn.square().sum((1, 2)), 1600)
        found.append(best), errors.append(error)
    found = torch.stack(found)
    assert abs(found.mean() * 16 - 1) < .01 and abs(torch.stack(errors).mean() / found.std() - 1) < .1


def ablations_module():
    sys.path.insert(0, str(HERE / "benchmarks"))
    import ablations
    return ablations


def test_ablations_train_score_and_write_a_table_and_go_on(tmp_path, monkeypatch, capfd):
    ablations = ablations_module()
    monkeypatch.setattr(ablations, "HERE", tmp_path)
    (tmp_path / "RESULTS.md").write_text("# Results\n\nbefore\n")
    flags = ["--finding", "multiscale", "--sizes", "32", "--steps", "2", "--batch", "2", "--seeds", "2", "--samples", "10", "--sample-steps", "10",
             "--out", str(tmp_path / "runs")]
    ablations.main(flags)
    assert "step/s" not in capfd.readouterr().err               # the bars of several rows would run into each other
    page = (tmp_path / "RESULTS.md").read_text()
    scores = {(name, seed): json.loads((tmp_path / f"runs/multiscale-tiny-32-{name}-2x2-{seed}/scores.json").read_text()) for name in ("off", "on") for seed in (0, 1)}
    two = [scores["on", seed]["structure"] for seed in (0, 1)]
    assert f"| 32 | on | {np.mean(two):.4f} ± {abs(two[0] - two[1]) / 2**.5:.4f} |" in page and page.startswith("# Results\n\nbefore\n")
    gaps = [scores["off", seed]["structure"] - scores["on", seed]["structure"] for seed in (0, 1)]
    assert f"| 32 | on | {np.mean(gaps):+.4f} ± {abs(gaps[0] - gaps[1]) / 2**.5:.4f} |" in page
    small, full = np.mean([scores["on", seed]["errors"] for seed in (0, 1)], 0)
    assert f"| 32 | on | {small[0]:.3f} ({full[0]:.3f}) | {small[1]:.3f} ({full[1]:.3f}) |" in page
    gap = np.mean([scores["off", seed]["errors"][0][0] - scores["on", seed]["errors"][0][0] for seed in (0, 1)])
    assert f"| 32 | on: less than off by | {gap:+.3f} ± " in page
    assert Image.open(tmp_path / "multiscale-tiny-32-2x2-2-seeds.png").size[0] > 720
    assert "](multiscale-tiny-32-2x2-2-seeds.png)" in page
    when = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.*") if file.suffix in (".pt", ".json")}
    ablations.main(flags)
    assert when == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.*") if file.suffix in (".pt", ".json")} and (tmp_path / "RESULTS.md").read_text() == page
    ablations.main([*flags, "--rows", "on"])                    # a table and a picture more
    after = (tmp_path / "RESULTS.md").read_text()
    some = after.removeprefix(page.rstrip())
    assert len(some) < len(after) and f"| 32 | on | {np.mean(two):.4f} ± {abs(two[0] - two[1]) / 2**.5:.4f} |" in some and "off" not in some
    assert Image.open(tmp_path / "multiscale-tiny-32-on-2x2-2-seeds.png")
    ablations.main([*flags, "--rows", "on", "off"])             # the finding's order
    assert (tmp_path / "RESULTS.md").read_text() == after


def put_scores(ablations, args, scores):
    """{(size, row): a number a seed, in place of every score} -> the files of their runs."""
    for (res, name), numbers in scores.items():
        for seed, number in enumerate(numbers):
            out = ablations.folder("blocks", res, name, seed, args)
            out.mkdir(parents=True)
            errors = [[number] * 5, [2 * number] * 5]           # averaged, and as it is
            (out / "scores.json").write_text(json.dumps(dict.fromkeys(ablations.METRICS, number) | dict(errors=errors)))


def test_ablations_gaps_and_how_they_grow_are_seed_by_seed(tmp_path):
    ablations = ablations_module()
    args = argparse.Namespace(model="tiny", batch=2, lr=1e-3, steps=2, samples=10, sample_steps=10, out=tmp_path)
    put_scores(ablations, args, {(16, "1"): [1, 2, 3], (16, "8"): [8, 9, 10], (24, "1"): [5, 7, 6], (24, "8"): [4, 2, 2],
                                 (32, "1"): [9, 9, 9], (32, "8"): [7, 5, 0]})   # gaps: at 16 three of -7, at 24 1, 5 and 4, at 32 2, 4 and 9

    def told(sizes, seeds):
        args.seeds = seeds
        page = ablations.table("blocks", sizes, ["1", "8"], args, {(res, name): [1] for res in sizes for name in ("1", "8")})
        page = page[page.index("Less than 1 by"):]
        at = page.index("The rms error")
        return page[:at], page[at:]
    gaps, levels = told([16, 24, 32], 3)
    assert "| 16 | 8 | -7.0000 ± 0.0000 |" in gaps and "| 24 | 8 | +3.3333 ± 2.0817 |" in gaps and "| 32 | 8 | +5.0000 ± 3.6056 |" in gaps
    assert "| 16 to 24 | 8 | +10.3333 ± 2.0817 |" in gaps and "| 16 to 32 | 8 | +12.0000 ± 3.6056 |" in gaps
    assert "| 24 to 32 | 8 | +1.6667 ± 3.0551 |" in gaps        # of 1, -1 and 5
    assert "| 24 | 8 | 2.667 (5.333) |" in levels and "| 24 | 8: less than 1 by | +3.333 ± 2.082 (+6.667 ± 4.163) |" in levels
    assert "| 24 to 32 | 8: less than 1 by | +1.667 ± 3.055 (+3.333 ± 6.110) |" in levels
    assert "With 3 seeds a gap is told from none (5%, t test) from 2.48 deviations on" in gaps      # t of two degrees, 4.303, over the root of 3
    assert "16 to 24: the gap at 24 less that at 16." in gaps and " to " not in told([24], 3)[0]
    assert "With 2 seeds a gap is told from none (5%, t test) from 8.98 deviations on" in told([24], 2)[0]
    gaps, levels = told([24], 1)
    assert "| 24 | 8 | +1.0000 |" in gaps and "With" not in gaps and "less than" not in levels


def test_ablations_speed_is_over_that_of_the_first_row(tmp_path, monkeypatch, capsys):
    ablations = ablations_module()
    args = argparse.Namespace(model="tiny", batch=2, lr=1e-3, steps=2, seeds=3, samples=10, sample_steps=10, out=tmp_path / "runs")

    def fit(finding, res, name, seed, args, steps, out):        # two rows' logs, the second row half as fast, and slower each time
        turns.append((finding, res, name, steps))
        speed = {"1": 10, "8": 5}[name] / len(turns)
        lines = [dict(step=20, images_per_second=1), dict(step=40, images_per_second=speed), dict(step=40, validation=[1]), dict(step=60, images_per_second=3 * speed)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:most]))
    turns, most, rows, sizes = [], 4, ["1", "8"], [16, 24]
    monkeypatch.setattr(ablations, "fit", fit)
    pools = []
    monkeypatch.setattr(ablations, "ProcessPoolExecutor", lambda count, _, **options: pools.append((count, options)) or contextlib.nullcontext(argparse.Namespace(map=map)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert ablations.pace("blocks", 16, "1", args) == 20
    turns = []
    found = ablations.paces("blocks", sizes, rows, args, rounds=2)
    assert turns == [("blocks", res, name, 60) for _ in range(2) for res in sizes for name in rows]
    assert found[16, "1"] == found[24, "1"] == [1, 1]
    assert found[16, "8"] == pytest.approx([1 / 4, 5 / 12]) and found[24, "8"] == pytest.approx([3 / 8, 7 / 16])
    assert pools == [(1, dict(max_tasks_per_child=1))]          # one at a time, each in a process of its own
    most = 2                                                    # told to stop
    with pytest.raises(KeyboardInterrupt):
        ablations.pace("blocks", 16, "1", args)
    put_scores(ablations, args, {(16, "1"): [1, 2, 3], (16, "8"): [8, 9, 10]})
    page = ablations.table("blocks", [16], rows, args, {(16, "1"): [1, 1, 1], (16, "8"): [.5, .6, .7]})
    assert "| 9.00 ± 1.00 | 0.60 ± 0.10 |" in page and "| 2.00 ± 1.00 | 1.00 ± 0.00 |" in page     # FLOPs, speed
    monkeypatch.setattr(ablations, "HERE", tmp_path)
    monkeypatch.setattr(ablations, "cell", lambda *row: None)
    monkeypatch.setattr(ablations, "pictures", lambda *row: "")
    turns, most = [], 4
    flags = "--finding blocks --sizes 16 --rows 1 8 --steps 2 --batch 2 --samples 10 --sample-steps 10 --out".split() + [str(args.out)]
    ablations.main(flags)
    speeds = [1 / 4, 3 / 8, 5 / 12]                             # three rounds
    assert f"| 9.00 ± 1.00 | {np.mean(speeds):.2f} ± {np.std(speeds, ddof=1):.2f} |" in (tmp_path / "RESULTS.md").read_text()
    page = (tmp_path / "RESULTS.md").read_text()

    def full(*file):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(ablations, "write", full)               # only the page is left to be written
    capsys.readouterr()
    with pytest.raises(SystemExit):
        ablations.main(flags)
    said = capsys.readouterr().err
    assert "No space left on device: mended" in said and said.count("\n") == 1 and (tmp_path / "RESULTS.md").read_text() == page


def test_ablations_that_cannot_run_end_with_a_line(tmp_path, capsys):
    ablations = ablations_module()
    (tmp_path / "file").touch()
    assert "file/runs: Not a directory" in one_line(capsys, ablations.main, ["--finding", "dropout", "--out", str(tmp_path / "file/runs")])
    assert "invalid choice" in one_line(capsys, ablations.main, ["--finding", "dropout", "--model", "huge"])
    assert "of 'off', 'on'" in one_line(capsys, ablations.main, ["--finding", "multiscale", "--rows", "half"])
    for flag in "--jobs", "--seeds":
        assert "--seeds and --jobs at least 1" in one_line(capsys, ablations.main, ["--finding", "multiscale", flag, "0"])


def test_ablations_error_is_that_of_a_known_network():
    """x_hat = 0: the error is the picture, at any noise; averaged, the averaged picture. x_hat = x: none."""
    ablations = ablations_module()
    fresh = data.Flowers(72, seed=1_000_003)
    x = torch.stack([fresh[n][0] for n in range(16)])
    zero = lambda z, logsnr, label: z * torch.exp(logsnr / 2)[:, None, None, None]          # v = alpha z / sigma
    small, full = ablations.validate(zero, 72, 16)
    assert np.allclose(full, x.square().mean().sqrt(), atol=1e-5) and np.allclose(small, F.avg_pool2d(x, 2).square().mean().sqrt(), atol=1e-5)

    def perfect(z, logsnr, label):
        alpha, sigma = schedule.alpha_sigma(logsnr)
        seen.append(logsnr[0] + 2 * math.log(2))
        return (alpha * z - x) / sigma
    seen = []
    assert np.allclose(ablations.validate(perfect, 72, 16), 0, atol=1e-5) and np.allclose(seen, ablations.LEVELS, atol=1e-5)

    def far(z, logsnr, label):                      # x_hat = 7: clipped to 1, as in sampling
        alpha, sigma = schedule.alpha_sigma(logsnr)
        return (alpha * z - 7) / sigma
    assert np.allclose(ablations.validate(far, 72, 16)[1], (1 - x).square().mean().sqrt(), atol=1e-4)
    mine = [(picture / 2, torch.tensor([0, 0]), {}) for picture in x]
    assert np.allclose(ablations.validate(zero, 72, 16, pictures=mine)[1], x.square().mean().sqrt() / 2, atol=1e-5)


def test_ablations_score_structure_without_what_averaging_takes_away():
    ablations = ablations_module()
    x, petals, _ = ablations.score.real(20, 72)
    sign = torch.tensor([[1., -1.], [1., -1.]]).repeat(36, 36)
    clean, grainy = (ablations.scored(pictures, 72) for pictures in (x, x + .2 * sign))
    assert (clean["petals"] == petals).float().mean() >= .9
    small, truth = (F.avg_pool2d(pictures, 2) for pictures in (x, ablations.score.real(500, 72, seed=1_000_005)[0]))
    assert clean["distance"] == pytest.approx(ablations.score.compare(small, truth)["distance"])
    assert [ablations.structure(torch.zeros(1, 3, res, res)).shape[-1] for res in (36, 64, 72, 128, 144, 288, 576)] == [36, 32, 36, 32, 36, 36, 36]
    for name in ("petals", "asymmetry", "axes"):
        assert torch.allclose(clean[name].float(), grainy[name].float(), atol=1e-3), name
    assert abs(clean["distance"] - grainy["distance"]) < 1e-3 and clean["detail"] < 2 < 10 < grainy["detail"]


def test_ablations_changes_are_what_their_names_say(tmp_path, monkeypatch):
    ablations = ablations_module()
    for module, name in ((sampling, "UViT"), (train, "logsnr_schedule"), (uvit, "wavelet_levels"), (train, "wavelet_levels")):
        monkeypatch.setattr(module, name, getattr(module, name))                # put back afterwards
    ablations.predict_eps()
    config = vars(train.parse_config(["--res", "64"]))
    torch.manual_seed(0)
    model = sampling.network(config, 10)
    torch.nn.init.normal_(model.project_out.weight)
    plain = uvit.UViT(64, **uvit.PRESETS["tiny"], classes=10)
    plain.load_state_dict(model.state_dict())
    z, logsnr, label = torch.randn(2, 3, 64, 64), torch.tensor([-6., 4.]), torch.tensor([1, 2])
    eps = losses.eps_from_v(z, model(z, logsnr, label), *schedule.alpha_sigma(logsnr))
    assert torch.allclose(eps, plain(z, logsnr, label), atol=1e-4) and not torch.allclose(eps, model(z, logsnr, label), atol=.1)
    ablations.train_on_elbo()
    clock = train.logsnr_schedule("shifted", 64, 32)
    assert torch.allclose(clock(torch.tensor([0., .25, 1.])), torch.tensor([15., 7.5, -15.]) - 2 * math.log(2), atol=1e-5)
    assert torch.allclose(ablations.logsnr_schedule("shifted", 64, 32)(torch.tensor([.5])), torch.tensor([-2 * math.log(2)]), atol=1e-5)     # samples: as before
    ablations.levels(2)()
    monkeypatch.setattr(uvit, "PRESETS", {name: dict(preset) for name, preset in uvit.PRESETS.items()})
    monkeypatch.setattr(sampling, "PRESETS", uvit.PRESETS)
    ablations.widen(48)
    for res in ("144", "288"):
        assert sampling.network(vars(train.parse_config(["--res", res, "--model", "tiny"])), 0).project_in.weight.shape[:2] == (48, 48)
    assert sampling.network(vars(train.parse_config(["--res", "288"])), 0).levels == 2 and sampling.network(vars(train.parse_config(["--res", "64"])), 0).levels == 2
    given = []
    monkeypatch.setattr(train, "main", lambda argv: given.append(vars(train.parse_config(argv))))
    for finding, row in ("schedule", "cosine"), ("multiscale", "off"), ("multiscale", "on"):    # at 512 it would be on by itself
        ablations.fit(finding, 512, row, 3, argparse.Namespace(model="tiny", batch=4, lr=1e-3, out=tmp_path), 7, tmp_path / row / "run")
    assert [config["multiscale"] for config in given] == ["off", "off", "on"] and [config["schedule"] for config in given] == ["cosine", "shifted", "shifted"]
    assert given[0].items() >= dict(res=given[0]["res"], steps=7, seed=3, batch=4, lr=1e-3).items()
    folder = ablations.few_pictures(tmp_path / "few", 24)
    few = data.Pictures(folder, 24)
    assert len(few.names) == 256 and few.classes == [f"{k:02d} petals" for k in range(3, 13)]
    assert not list(Path(folder).rglob("*.part"))


@pytest.mark.parametrize("flags, words", [("nowhere", "nowhere: no picture there"), ("{tmp} --prompts {tmp}/none", "holds no line"),
                                          ("{tmp} --prompts nowhere", "No such file"), ("--new nowhere/prompts", "No such file")])
def test_wrong_call_of_score_ends_with_exit_code_2(tmp_path, flags, words, capsys):
    sys.path.insert(0, str(HERE / "benchmarks"))
    import score
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    (tmp_path / "none").write_text("\n")
    with pytest.raises(SystemExit) as stop:
        score.main(flags.format(tmp=tmp_path).split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_each_mutant_is_of_code_that_still_stands():
    """benchmarks/mutants.py stops at the first that it cannot find."""
    sys.path.insert(0, str(HERE / "benchmarks"))
    import mutants
    lost = [(file, old) for rows in mutants.LISTS.values() for file, old, *_ in rows if (HERE / file).read_text("utf-8").count(old) != 1]
    formulas, *more = map(len, mutants.LISTS.values())
    assert not lost and f"{formulas} ways the formulas, {sum(more)} more" in " ".join((HERE / "README.md").read_text("utf-8").split())
