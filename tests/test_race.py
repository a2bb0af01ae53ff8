"""benchmarks/race.py: what is held out, the clock, the scores, the others where installed."""
import importlib.util
import json
import math

import pytest
import torch

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


def test_no_photograph_that_is_scored_against_is_trained_on(tmp_path):
    write_folder(tmp_path / "set")
    everything = Pictures(tmp_path / "set", race.RES)
    for i, name in enumerate(everything.names):
        assert race.is_held_out(name) == race.is_held_out("elsewhere/" + name), name
    train, new = (race.pictures(str(tmp_path / "set"), 0, held_out) for held_out in (False, True))
    assert sorted(train.names + new.names) == everything.names
    for dataset in (train, new):
        label = dict(zip(everything.names, everything.labels))
        assert dataset.labels == [label[name] for name in dataset.names]
    held_out = [race.is_held_out(f"{i}.webp") for i in range(4000)]
    assert .08 < sum(held_out) / 4000 < .12
    assert not torch.equal(race.pictures("flowers", 0)[0][0],
                           race.pictures("flowers", 0, held_out=True)[0][0])


@pytest.mark.parametrize("racer", all_racers)
def test_a_racer_trains_and_its_v_hat_gives_back_the_pictures(racer, monkeypatch):
    """x_hat = alpha z - sigma v_hat is x if the network's EMA knows the noise, or x, exactly."""
    this = race.RACERS[racer](10, batch=4)
    dataset = race.pictures("flowers", 0)
    x, cond, _ = race.collate([dataset[n] for n in range(4)])
    x, before = race.from_uint8(x), [p.clone() for p in this.ema.parameters()]
    for _ in range(2):                          # the first copies the network that it began with
        assert math.isfinite(this.train(range(4), x, cond, .5))
    assert any(not torch.equal(p, q) for p, q in zip(this.model.parameters(), before))
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


def test_run_and_score_tell_what_was_trained_and_for_how_long(tmp_path, monkeypatch, little):
    clock = iter(range(0, 10**6, 6))                    # each look at the clock: 6 seconds later
    monkeypatch.setattr(race.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(race, "FOLDER", tmp_path)
    monkeypatch.setattr(race, "MARKS", (.3, 5))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    race.main("run ours flowers --seed 3 --minutes .5 --batch 4 --bf16 off".split())
    files = sorted(tmp_path.glob("*.pt"))
    saved = [torch.load(file) for file in files]
    assert torch.get_num_threads() == threads
    # A step takes 6 seconds: 18 seconds are 3 steps, 30 are 5.
    assert sorted((part["minutes"], part["pictures"]) for part in saved) == [(.3, 12), (.5, 20)]
    assert all(part["of"] == .5 and part["seed"] == 3 and part["racer"] == "ours" for part in saved)
    monkeypatch.setattr(race, "scores", lambda file: dict(
        racer="ours", source="flowers", seed=3, lr=None, batch=4, tag="", minutes=1, of=1,
        pictures=20, error=[.5] * 5, distance=.25, detail=1.0))
    race.main(["score"])
    assert [json.loads(file.with_suffix(".json").read_text())["distance"] for file in files] \
        == [.25, .25]


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
    new = Flowers(race.RES, 10**6)
    x = torch.stack([new[n][0] for n in range(64)]) / 127.5 - 1
    rms = x.square().mean().sqrt().item()
    assert found["error"] == pytest.approx([rms] * 5, rel=1e-3)
    grey = torch.full((40, 3, race.RES, race.RES), .5)
    expected = score.compare(grey, score.real(500, race.RES, seed=7)[0])
    assert found["distance"] == pytest.approx(expected["distance"], rel=1e-3)
    assert 0 <= found["petals"] <= .3
