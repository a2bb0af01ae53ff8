"""torch.compile: the same training and the same samples as uncompiled."""
import os
import re
import subprocess
from functools import partial

import numpy as np
import pytest
import torch

import memory
import ranks
import run
import sample as sampling
import train
import uvit
from tests.helpers import (HERE, PYTHON, SMALL, last_checkpoint, log_lines, run_ranks, run_train,
                           same_to_rounding)
from tests.test_memory import BY_MEMORY

# The fewest kinds of kernel: each costs the C++ compiler a second.
FEW = "--res 16 --set blocks_16=1".split()
compile_by_inductor = torch.compile


def compile_in_python(function=None, backend="aot_eager", options=None, **rest):
    """torch.compile up to the graphs of the forward and the backward pass, which then run without
    a C++ compiler.
    """
    return compile_by_inductor(function, backend=backend, **rest)


@pytest.mark.parametrize("flags", [["--recompute"], ["--shard", "--recompute"]],
                         ids=["ddp", "shard"])
def test_compiled_ranks_learn_what_plain_ones_learn(tmp_path, little, flags):
    script = tmp_path / "in_python.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(HERE)!r}]
import tests.little, tests.test_compiled, torch, train
torch.compile = tests.test_compiled.compile_in_python
train.main()
""")
    two = [2, script, *SMALL, "blocks_16=1", "dropout=.3", "--steps", "3"]
    run_ranks(*two, "--out", tmp_path / "plain")
    run_ranks(*two, *flags, "--compile", "on", "--out", tmp_path / "fast")
    plain, fast = last_checkpoint(tmp_path / "plain"), last_checkpoint(tmp_path / "fast")
    assert fast["config"]["compile"] and not plain["config"]["compile"]
    assert same_to_rounding(plain, fast)


def test_compiled_dropout_has_the_masks_of_plain_dropout_also_in_the_backward_pass():
    film, drop = torch.nn.Linear(8, 64), torch.nn.Dropout(.5)

    def block(x, emb):
        scale, shift = film(emb)[:, None].chunk(2, -1)
        return drop(x * (1 + scale) + shift)
    x, emb = torch.randn(2, 64, 32, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    compiled = torch.compile(block, options=ranks.compile_options(x.device))
    for seed in (1, 2):
        torch.manual_seed(seed)
        y = compiled(x, emb)
        gradient, = torch.autograd.grad(y.sum(), x)
        assert torch.equal(gradient != 0, y != 0) and .3 < (y == 0).float().mean() < .7
        torch.manual_seed(seed)
        assert torch.allclose(y, block(x, emb), atol=1e-5)


def test_the_rehearsal_of_the_memory_compiles_what_training_runs_and_nothing_else(
        tmp_path, little, monkeypatch):
    graphs, counts = [], {}
    monkeypatch.setattr(run, "RAISES", {"cpu"})
    monkeypatch.setattr(torch, "compile", partial(
        compile_in_python, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    monkeypatch.setattr(memory, "parts_that_fit", lambda *rest: (2, "as asked"))
    rehearsed, honest = [], run.fits
    monkeypatch.setattr(run, "fits", lambda *args: rehearsed.append(0) or honest(*args))
    for name, flags in dict(tried=[], given=["--accum", "2"]).items():
        torch._dynamo.reset()
        graphs.clear()
        train.main([*BY_MEMORY, *FEW, "--compile", "on", *flags, "--steps", "2", "--out",
                    str(tmp_path / name)])
        counts[name] = len(graphs), len(rehearsed)
    assert counts["tried"] == counts["given"] and counts["tried"][0] > 0
    assert rehearsed == [0]


def test_no_compiler_is_one_line(tmp_path, trained_run):
    nothing = dict(CXX=str(tmp_path / "no"), CC=str(tmp_path / "no"),
                   TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    for command in (["train.py", *SMALL, "--steps", "1", "--compile", "on"],
                    ["sample.py", "--ckpt", trained_run / "model.pt", "--compile"]):
        done = subprocess.run([*PYTHON, *map(str, command), "--out", str(tmp_path / "out")],
                              cwd=HERE, env=os.environ | nothing, capture_output=True, text=True)
        words = r"--compile( on)?: no compiler works here \(.*\); .*(does without|this option)\n"
        assert done.returncode == 1 and re.fullmatch(words, done.stderr), done.stderr
        assert not (tmp_path / "out").exists()


def test_without_a_compiler_training_is_not_compiled_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(run, "compiler_trouble",
                        lambda device: "no compiler works here (no cl.exe)")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [run.compile_or_not(None, device) for device in (cuda, cpu)] == [False, False]
    assert capsys.readouterr().out == \
        "Training is not compiled, which is slower: no compiler works here (no cl.exe).\n"
    for device in (cuda, cpu):
        with pytest.raises(SystemExit) as stop:
            run.compile_or_not(True, device)
        assert stop.value.code == 1
        assert capsys.readouterr().err == "--compile on: no compiler works here (no cl.exe); " \
            "--compile off does without\n"
    monkeypatch.setattr(run, "compiler_trouble", lambda device: None)
    assert [run.compile_or_not(*how) for how in
            ((None, cuda), (None, cpu), (True, cpu), (True, cuda), (False, cuda))] == \
        [True, False, True, True, False]


def test_compiled_and_bf16_training_follows_the_plain_one(tmp_path, little):
    run_train(tmp_path / "plain", *FEW, "--steps", "4")
    run_train(tmp_path / "fast", *FEW, "bf16=on", "--steps", "4", "--compile", "on")
    plain, fast = ([line["loss"] for line in log_lines(tmp_path / name)]
                   for name in ("plain", "fast"))
    assert np.allclose(plain, fast, rtol=.03)
    weights = [last_checkpoint(tmp_path / name)["model"] for name in ("plain", "fast")]
    assert weights[0].keys() == weights[1].keys()


def test_compiled_samples_are_the_plain_ones(tmp_path, little, monkeypatch):
    run_train(tmp_path / "run", *FEW, "--steps", "1")
    asked, honest = [], uvit.UViT.compile
    monkeypatch.setattr(uvit.UViT, "compile", lambda self, **options: asked.append(options)
                        or honest(self, **options))
    monkeypatch.setattr(ranks, "pick_device", lambda: (torch.device("cpu"), False))
    sizes, drawing = [], sampling.sampling_steps

    def sampling_steps(model, schedule, noise, steps, cond, *rest):
        sizes.append(len(cond.label))
        return drawing(model, schedule, noise, steps, cond, *rest)
    monkeypatch.setattr(sampling, "sampling_steps", sampling_steps)
    common = ["--ckpt", str(tmp_path / "run/model.pt"), "--batch", "2"]
    for name, flags in dict(plain=[], fast=["--compile"]).items():
        sampling.main([*common, "--n", "3", "--steps", "3", "--guidance", "2", "--out",
                       str(tmp_path / name), *flags])
    plain, fast = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int)
                   for name in ("plain", "fast"))
    assert np.abs(plain - fast).max() <= 1
    assert asked == [dict(mode="reduce-overhead", dynamic=False)]
    assert sizes == [2, 1, 2, 2]                    # compiled for one size of batch
    sampling.main([*common, "--n", "1", "--steps", "1", "--out", str(tmp_path / "one"),
                   "--compile"])
    assert sizes[4:] == [1]
