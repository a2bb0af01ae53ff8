"""torch.compile: the same training and the same samples as uncompiled."""
import os
import re
import subprocess
from functools import partial

import numpy as np
import pytest
import torch

import memory
import sample as sampling
import train
import uvit
from helpers import run_ranks
from test_all import HERE, PYTHON, SMALL, last_checkpoint, log_lines, one_line, run_train, same_to_rounding

FEW = "--res 16 --blocks-16 1".split()      # the fewest kinds of kernel: each costs the C++ compiler a second
compile_by_inductor = torch.compile


def compile_in_python(function=None, backend="aot_eager", options=None, **rest):
    """torch.compile up to the graphs of the forward and the backward pass, which then run without a C++ compiler."""
    return compile_by_inductor(function, backend=backend, **rest)


@pytest.mark.parametrize("flags", [["--recompute"], ["--shard", "--recompute"]], ids=["ddp", "shard"])
def test_compiled_ranks_learn_what_plain_ones_learn(tmp_path, little, flags):
    script = tmp_path / "in_python.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE / "tests")!r}]
import little, torch, test_compiled, train
torch.compile = test_compiled.compile_in_python
train.main()
train.dist.destroy_process_group()
""")
    two = [2, script, *SMALL, "--blocks-16", "1", "--dropout", ".3", "--steps", "3"]
    run_ranks(*two, "--out", tmp_path / "plain")
    run_ranks(*two, *flags, "--compile", "on", "--out", tmp_path / "fast")
    assert same_to_rounding(last_checkpoint(tmp_path / "plain"), last_checkpoint(tmp_path / "fast"))


def test_compiled_code_keeps_a_share_of_the_activations_for_the_backward_pass(tmp_path, little, monkeypatch):
    kept = {}
    monkeypatch.setattr(torch, "compile", partial(compile_in_python, backend="aot_eager_decomp_partition"))
    for share in ("1", "0.2"):
        torch._dynamo.reset()                               # else the first one's code serves the second, too
        sizes = {}                                          # by address: a view is not counted again
        hook = lambda tensor: sizes.update({tensor.data_ptr(): tensor.nbytes}) or tensor
        with torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor):
            run_train(tmp_path / share, "--steps", "1", "--compile", "on", "--memory-budget", share)
        kept[share] = sum(sizes.values())
    assert kept["0.2"] < .8 * kept["1"], kept
    one, other = (last_checkpoint(tmp_path / share) for share in kept)
    assert same_to_rounding(one, other)


def test_compiled_dropout_has_the_same_masks_in_the_backward_pass(tmp_path, little, monkeypatch, capsys):
    """Where less than all activations are kept, torch draws them anew (pytorch #190758)."""
    film, drop = torch.nn.Linear(8, 64), torch.nn.Dropout(.5)

    def block(x, emb):
        scale, shift = film(emb)[:, None].chunk(2, -1)
        return drop(x * (1 + scale) + shift)
    monkeypatch.setattr(torch._functorch.config, "activation_memory_budget", train.memory_budget(torch.nn.ModuleList([film, drop]), -1))
    x, emb = torch.randn(2, 64, 32, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    y = torch.compile(block, options=train.compile_options(x.device))(x, emb)
    y.sum().backward()
    assert torch.equal(x.grad != 0, y != 0) and .3 < (y == 0).float().mean() < .7
    assert [train.memory_budget(torch.nn.Dropout(p), wanted) for p, wanted in ((0, -1), (0, 0), (0, .3), (.1, -1), (.1, 1))] == [.6, 0, .3, 1, 1]
    for wanted in (0, .5):
        assert "must be 1 where there is dropout" in one_line(capsys, lambda _: train.memory_budget(torch.nn.Dropout(.1), wanted), [])
    monkeypatch.setattr(uvit.UViT, "compile", lambda self, **options: None)
    for p, budget in (("0.3", 1), ("0", .6)):
        run_train(tmp_path / p, "--steps", "1", "--compile", "on", "--dropout", p)
        assert torch._functorch.config.activation_memory_budget == budget


def test_the_rehearsal_of_the_memory_compiles_what_training_runs_and_nothing_else(tmp_path, little, monkeypatch):
    for name in ("memory", "train"):
        monkeypatch.setattr(f"{name}.RAISES", {"cpu"})
    graphs, runs = [], {}
    monkeypatch.setattr(torch, "compile", partial(compile_in_python, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    for accum in "02":
        torch._dynamo.reset()
        graphs.clear()
        monkeypatch.setattr(memory, "parts_that_fit", lambda *rest: (2, "as asked"))
        monkeypatch.setattr(train, "parts_that_fit", memory.parts_that_fit)
        run_train(tmp_path / accum, *FEW, "--compile", "on", "--accum", accum, "--steps", "2")
        runs[accum] = len(graphs)
    assert runs["0"] == runs["2"] > 0


def test_no_compiler_is_one_line(tmp_path, trained_run):
    nothing = dict(CXX=str(tmp_path / "no"), CC=str(tmp_path / "no"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    for command in (["train.py", *SMALL, "--steps", "1", "--compile", "on"], ["sample.py", "--ckpt", trained_run / "model.pt", "--compile"]):
        run = subprocess.run([*PYTHON, *map(str, command), "--out", str(tmp_path / "out")], cwd=HERE, env=os.environ | nothing, capture_output=True, text=True)
        assert run.returncode == 1 and re.fullmatch(r"--compile( on)?: no compiler works here \(.*\); .* does without\n", run.stderr), run.stderr
        assert not (tmp_path / "out").exists()


def test_without_a_compiler_training_is_not_compiled_unless_it_was_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(train, "compiler_trouble", lambda device: "no compiler works here (no cl.exe)")
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [train.compile_here("", device) for device in (cuda, cpu)] == ["off", "off"]
    assert capsys.readouterr().out == "Training is not compiled, which is slower: no compiler works here (no cl.exe).\n"
    with pytest.raises(SystemExit):
        train.compile_here("on", cuda)
    monkeypatch.setattr(train, "compiler_trouble", lambda device: None)
    assert [train.compile_here(*how) for how in (("", cuda), ("", cpu), ("on", cpu), ("off", cuda))] == ["on", "off", "on", "off"]


def test_compiled_and_bf16_training_follows_the_plain_one(tmp_path, little):
    run_train(tmp_path / "plain", *FEW, "--steps", "4")
    run_train(tmp_path / "fast", *FEW, "--steps", "4", "--compile", "on", "--bf16", "on")
    plain, fast = ([line["loss"] for line in log_lines(tmp_path / name)] for name in ("plain", "fast"))
    assert np.allclose(plain, fast, rtol=.03)
    assert set(last_checkpoint(tmp_path / "fast")["model"]) == set(last_checkpoint(tmp_path / "plain")["model"])


def test_compiled_samples_are_the_plain_ones(tmp_path, little, monkeypatch):
    run_train(tmp_path / "run", *FEW, "--steps", "1")
    ckpt = str(tmp_path / "run/model.pt")
    asked, honest = [], uvit.UViT.compile
    monkeypatch.setattr(uvit.UViT, "compile", lambda self, **options: asked.append(options) or honest(self, **options))
    monkeypatch.setattr(sampling, "pick_device", lambda: (torch.device("cpu"), False))
    sizes, draw = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *args, **kwargs: sizes.append(len(args[4])) or draw(*args, **kwargs))
    for name, flags in dict(plain=[], fast=["--compile"]).items():
        sampling.main(["--ckpt", ckpt, "--n", "3", "--batch", "2", "--steps", "3", "--guidance", "2", "--out", str(tmp_path / name), *flags])
    plain, fast = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "fast"))
    assert np.abs(plain - fast).max() <= 1 and asked == [dict(mode="reduce-overhead", dynamic=False)]
    assert sizes == [2, 1, 2, 2]                                # compiled for one size of batch
    sampling.main(["--ckpt", ckpt, "--n", "1", "--batch", "2", "--steps", "1", "--out", str(tmp_path / "one"), "--compile"])
    assert sizes[4:] == [1]
