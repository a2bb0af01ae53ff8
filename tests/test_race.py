"""benchmarks/race.py: what is held out, the clock, the scores, the others where installed."""
import importlib.util
import json
import math

import pytest
import torch
from PIL import Image

import race
import score
from data import Pictures
from flowers import Flowers
from tests.helpers import write_folder

RIVALS = {"UViT": "denoising_diffusion_pytorch", "UViT-eps": "denoising_diffusion_pytorch",
          "UNet2D": "diffusers"}
installed = lambda racer: pytest.mark.skipif(
    racer in RIVALS and not importlib.util.find_spec(RIVALS[racer]),
    reason=f"{RIVALS.get(racer)} is not installed")
all_racers = [pytest.param(racer, marks=installed(racer)) for racer in ("ours", *RIVALS)]


def test_no_photograph_that_is_scored_against_is_trained_on(tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    everything = Pictures(tmp_path / "set", race.RES)
    for i, name in enumerate(everything.names):
        assert race.is_held_out(name) == race.is_held_out("elsewhere/" + name), name
    held_out = [race.is_held_out(f"{i}.webp") for i in range(4000)]
    assert .08 < sum(held_out) / 4000 < .12
    monkeypatch.setattr(race, "is_held_out", lambda name: name.endswith(("1.png", "6.png")))
    train, new = (race.pictures(str(tmp_path / "set"), 0, held_out) for held_out in (False, True))
    assert sorted([*train.names, *new.names]) == list(everything.names)
    assert all(map(race.is_held_out, new.names)) and not any(map(race.is_held_out, train.names))
    for dataset in (train, new):
        label = dict(zip(everything.names, everything.listing.labels))
        assert dataset.listing.labels.tolist() == [label[name] for name in dataset.names]
    assert not torch.equal(race.pictures("flowers", 0)[0][0],
                           race.pictures("flowers", 0, held_out=True)[0][0])


@pytest.mark.parametrize("source, trained", [("flowers", False), ("{tmp}/set", True)])
def test_photographs_are_compared_by_a_trained_network(source, trained, tmp_path, monkeypatch):
    write_folder(tmp_path / "set")
    monkeypatch.setattr(race, "is_held_out", lambda name: name.endswith(("1.png", "6.png")))
    source, asked = source.format(tmp=tmp_path), []
    this = race.Ours(len(race.pictures(source, 0).classes), batch=4)
    torch.save(dict(racer="ours", source=source, seed=0, lr=None, batch=4, minutes=1, of=1,
                    pictures=4, weights=this.ema.state_dict()), tmp_path / "ours.pt")
    monkeypatch.setattr(score, "compare", lambda x, truth, trained: asked.append(trained)
                        or dict(distance=1., detail=1.))
    race.scores(tmp_path / "ours.pt", n=2, steps=1)
    assert asked == [trained, trained]


@pytest.mark.parametrize("racer", all_racers)
def test_a_racer_trains_and_its_v_hat_gives_back_the_pictures(racer, monkeypatch):
    """x_hat = alpha z - sigma v_hat is x if the network's EMA knows the noise, or x, exactly."""
    this = race.RACERS[racer](10, batch=4)
    dataset = race.pictures("flowers", 0)
    x, cond, _ = race.collate([dataset[n] for n in range(4)])
    x, before = race.from_uint8(x), [p.clone() for p in this.model.parameters()]
    assert math.isfinite(this.train(range(4), x, cond, .5))     # the EMA is a copy, so far
    assert any(not torch.equal(p, q) for p, q in zip(this.model.parameters(), before))
    assert all(torch.equal(p, q) for p, q in zip(this.model.parameters(), this.ema.parameters()))
    logsnr, eps = torch.tensor([6., 2., -1., -4.]), torch.randn(x.shape)
    alpha, sigma = race.alpha_sigma(logsnr)
    z, v = alpha * x + sigma * eps, alpha * eps - sigma * x

    class Known(torch.nn.Module):
        def forward(self, z_t, time, *_):
            if racer != "UNet2D":
                assert torch.equal(time, logsnr)
                return v
            # DDPM: alpha^2 at a time is the product of 1 - beta up to it.
            beta = torch.linspace(1e-4, .02, 1000, dtype=torch.float64)
            known = torch.logit((1 - beta).cumprod(0))
            low, high = known[time.floor().long()], known[time.ceil().long()]
            between = low + (time - time.floor()) * (high - low)
            assert (between - logsnr).abs().max() < 1e-3
            return type("Output", (), dict(sample=eps))

    this.ema = Known()
    assert torch.allclose(alpha * z - sigma * this.v_hat(z, logsnr), x, atol=1e-4)


@pytest.mark.parametrize("racer, known", [
    # ema_pytorch: 1 - n^(-2/3) for the n-th step after 100, at most 0.995, every 10 steps
    pytest.param("UViT", {0: 0, 100: 0, 101: None, 110: 1 - 11 ** (-2 / 3), 5000: .995},
                 marks=installed("UViT")),
    # diffusers' EMAModel with power 3/4
    pytest.param("UNet2D", {0: 0, 15: .875, 10**6: .9999}, marks=installed("UNet2D")),
    ("ours", {0: 0, 9: .5, 10**6: .9999})])
def test_a_racer_has_the_ema_of_its_trainer(racer, known, monkeypatch):
    decays, this = [], race.RACERS[racer](10, batch=1)
    monkeypatch.setattr(race, "update_ema", lambda ema, model, decay: decays.append(decay))
    x = torch.zeros(1, 3, race.RES, race.RES)
    for step, decay in known.items():
        this.step, decays[:] = step, []
        this.train(range(1), x, race.Condition(torch.tensor([0])), .5)
        assert decays == ([] if decay is None else [pytest.approx(decay)]), step


@pytest.mark.parametrize("racer, known", [
    pytest.param("UNet2D", {0.: .02, .024: .5, .05: 1, .525: .5, .999: 0},
                 marks=installed("UNet2D")),
    ("ours", {.3: 1, .6: 1, .8: .5, .9: .25, .999: 0})])
def test_a_racer_has_the_rate_of_its_trainer(racer, known):
    this = race.RACERS[racer](10, lr=1e-6, batch=1)
    x = torch.zeros(1, 3, race.RES, race.RES)
    for done, rate in known.items():
        this.step = 100_000
        this.train(range(1), x, race.Condition(torch.tensor([0])), done)
        assert this.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6 * rate, abs=5e-9), done


def test_run_and_score_tell_what_was_trained_for_how_long(tmp_path, monkeypatch, little, capsys):
    clock = iter(range(0, 10**6, 6))                    # each look at the clock: 6 seconds later
    monkeypatch.setattr(race.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(race, "FOLDER", tmp_path)
    monkeypatch.setattr(race, "MARKS", (.3, 5))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    race.main("run ours flowers --seed 3 --minutes .5 --batch 4 --bf16 off".split())
    files = sorted(tmp_path.glob("*.pt"))
    saved = [torch.load(file) for file in files]
    # A step takes 6 seconds: 18 seconds are 3 steps, 30 are 5.
    assert sorted((part["minutes"], part["pictures"]) for part in saved) == [(.3, 12), (.5, 20)]
    assert all(part["of"] == .5 and part["seed"] == 3 and part["racer"] == "ours" for part in saved)
    monkeypatch.setattr(race, "scores", lambda file: dict(
        racer="ours", source="flowers", seed=3, lr=None, batch=4, tag="", minutes=1,
        pictures=20, error=[10.5, .25, 1, 1, 1], distance=.25, detail=1., real=.125, of=1,
        bf16="off"))
    race.main(["score"])
    assert [json.loads(file.with_suffix(".json").read_text())["distance"] for file in files] \
        == [.25, .25]
    capsys.readouterr()
    race.main(["table"])
    printed = capsys.readouterr().out
    row = "| ours | 4 off | 3 | 1 of 1 | 20 | 10.500 .250 1.000 1.000 1.000 | 0.250 |  |"
    assert printed.count(row) == 2 and "| real | | | | | | 0.125 | |" in printed
    assert Image.open(tmp_path / "flowers.webp").size == (720, 400)


def test_error_and_distance_are_those_of_a_network_that_knows_one_picture(tmp_path, monkeypatch):
    """x_hat = 0 at all times: the error is the pictures' own, all samples are grey."""
    this = race.Ours(10, batch=4)
    file = tmp_path / "ours.pt"
    torch.save(dict(racer="ours", source="flowers", seed=0, lr=None, batch=4, tag="", minutes=1,
                    of=1, pictures=4, weights=this.ema.state_dict()), file)

    def v_hat(self, z, logsnr, cond=None):
        alpha, sigma = race.alpha_sigma(logsnr)
        return alpha * z / sigma                        # x_hat = alpha z - sigma v_hat = 0

    monkeypatch.setattr(race.Ours, "v_hat", v_hat)
    found = race.scores(file, n=40, steps=2)
    new, others = Flowers(race.RES, race.OTHERS), Flowers(race.RES, 2 * race.OTHERS)
    x = torch.stack([new[n][0] for n in range(64)]) / 127.5 - 1
    rms = x.square().mean().sqrt().item()
    assert found["error"] == pytest.approx([rms] * 5, rel=1e-3)
    grey = torch.full((40, 3, race.RES, race.RES), .5)
    truth = torch.stack([others[n][0] for n in range(500)]) / 255
    expected = score.compare(grey, truth)
    assert found["distance"] == pytest.approx(expected["distance"], rel=1e-3)
    mine = torch.stack([Flowers(race.RES, 0)[n][0] for n in range(40)]) / 255
    assert found["real"] == pytest.approx(score.compare(mine, truth)["distance"], rel=1e-3)
