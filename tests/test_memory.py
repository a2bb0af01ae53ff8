"""memory.py: parts of a batch that fit the memory there is."""
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import memory
import ranks
import run
import train
import uvit
from checkpoint import build_network
from tests.helpers import (HERE, LITTLE, SMALL, condition, last_checkpoint, log_lines, one_line,
                           run_ranks, run_train, same_to_rounding)

GB = 1e9
BY_MEMORY = " ".join(SMALL).replace("--accum 1 ", "").split()       # as many parts as fit


def config_of(*flags):
    """Of a run at 32 x 32 in float32, not compiled."""
    config = train.parse_config(["--res", "32", *flags])
    return dataclasses.replace(config, bf16=False, compile=False)


def network_of(config):
    return build_network(**config.network_settings(classes=10))


def needed(config, world=1):
    return memory.needed(config, 10, world, "cpu", train.loss_function(config))


def kept_for_real(config, count):
    """Bytes of all storages that the backward pass of `count` pictures keeps on a CPU, but for
    the weights.
    """
    model, kept = network_of(config), {}
    own = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor      # held: an address is used once
        return tensor
    if config.recompute:
        memory.recompute_blocks(model)
    x, t = torch.rand(count, 3, config.res, config.res), torch.rand(count)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train.loss_function(config)(model, x, t, torch.randn_like(x))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("flags", [
    "", "--text bytes", "--set architecture=unet blocks_16=2", "--set skips=level",
    "--res 160 --set dropout=.1", "--res 64 --set multiscale=on", "--loss sid2", "--loss v"])
def test_what_is_kept_per_picture_is_what_autograd_keeps_of_one_more(little, flags):
    config = config_of(*flags.split())
    real = kept_for_real(config, 3) - kept_for_real(config, 2)
    with torch.device("meta"):
        counted = memory.kept_per_picture(network_of(config), config, train.loss_function(config))
    assert 1 <= counted / real < 1.3, (counted, real)       # norms on "meta" keep a little more


def test_recomputed_blocks_keep_their_input_and_the_largest_counts_once(little):
    def counted(blocks, recompute):
        config = dataclasses.replace(config_of(), blocks_16=blocks, recompute=recompute)
        with torch.device("meta"):
            return memory.kept_per_picture(network_of(config), config,
                                           train.loss_function(config))
    tokens, width = 16 * 16, 32
    # MLP and attention, float32
    assert counted(9, True) - counted(1, True) == 8 * 2 * 4 * tokens * width
    inputs = 4 * (2 * tokens * width + 2 * 32 * 32 * 16)
    block = network_of(config_of()).up[0][0]        # of two blocks at 32 x 32 that with a skip
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.update({tensor.data_ptr(): tensor}) or tensor,
            lambda tensor: tensor):
        block(torch.randn(1, 16, 32, 32, requires_grad=True), torch.randn(1, 32),
              torch.randn(1, 16, 32, 32))
    largest = sum(tensor.nbytes for tensor in kept.values())
    largest -= 4 * sum(p.numel() for p in block.parameters())
    assert inputs + largest < counted(1, True) < .7 * counted(1, False)


def test_weights_gradient_moments_and_average_are_20_bytes_a_weight_and_copies_of_them_16(
        little, monkeypatch):
    config = config_of()
    beside = memory.BASE + 100 * 12 * 32 * 32
    fixed, each, weights = needed(config)
    assert weights == sum(p.numel() for p in network_of(config).parameters())
    assert fixed == beside + 36 * weights
    assert memory.needed(config, 10, 1, "cuda", train.loss_function(config))[0] == \
        beside + 20 * weights
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    half, less, _ = needed(dataclasses.replace(config, bf16=True, compile=True, shard=True), 2)
    ddp, compiled, _ = needed(dataclasses.replace(config, compile=True), 2)
    assert ddp == beside + (24 + 8) * weights and compiled == .5 * each
    assert half == beside + (11 + 8) * weights and less == .75 * each


@pytest.mark.parametrize("version, files, room", [
    ("0::/a/b\n", {"memory.max": "max"}, math.inf),
    ("0::/a/b\n", {"a/b/memory.max": "6000", "a/b/memory.current": "2500",
                   "a/b/memory.stat": "anon 1\ninactive_file 500\n"}, 4000),
    ("0::/a/b\n", {"a/memory.max": "6000", "a/memory.current": "2500",
                   "a/b/memory.max": "max", "a/b/memory.current": "100"}, 3500),
    ("0::/../c\n", {"memory.max": "900", "memory.current": "100"}, 800),
    ("9:cpu:/x\n4:memory:/a/b\n0::/\n",
     {"memory/a/b/memory.limit_in_bytes": "6000", "memory/a/b/memory.usage_in_bytes": "1000",
      "memory/a/b/memory.stat": "inactive_file 7\ntotal_inactive_file 150\n"
                                "total_active_file 50\n"}, 5200),
    ("4:memory:/gone\n", {"memory/memory.limit_in_bytes": "700",
                          "memory/memory.usage_in_bytes": "100"}, 600),
    ("", {}, math.inf)],
    ids=["none", "own", "parent", "outside", "version 1", "in a container", "no groups"])
def test_limits_of_control_groups_are_those_of_the_group_and_all_around_it(
        tmp_path, version, files, room):
    (tmp_path / "self").write_text(version)
    for name, content in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(content)
    assert memory.cgroup_room(tmp_path / "fs", tmp_path / "self") == room


def test_ram_is_what_the_system_says_and_no_more_than_the_group_allows(monkeypatch):
    assert .2e9 < memory.ram() < 1e13
    monkeypatch.setattr(memory, "cgroup_room", lambda: 5e8)
    assert memory.ram() == 5e8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(torch.device("cpu")) == 5e8 // 4


# ---------------------------------------------------------------------------- parts of a batch

def fit(monkeypatch, free, batch=256, world=1, device="cpu", fixed=1 * GB, each=.1 * GB):
    monkeypatch.setattr(memory, "available", lambda device: free * GB)
    monkeypatch.setattr(memory, "needed", lambda *rest: (fixed, each, 50e6))
    config = config_of("--batch", str(batch))
    return memory.parts_that_fit(config, 10, world, torch.device(device), None)[0]


def test_parts_are_the_fewest_that_fit(monkeypatch):
    """A CPU gives half of what is free, for the rest is other programs', and no more than pays."""
    sizes = .005 * GB, .01 * GB, .1 * GB, 2 * GB
    assert [fit(monkeypatch, 60, each=each) for each in sizes] == [1, 2, 32, 256]
    assert [fit(monkeypatch, free, device="cuda") for free in (800, 80, 29, 24, 8)] == \
        [1, 1, 1, 2, 8]
    monkeypatch.setattr(memory, "CPU_PART", 1e12)
    assert [fit(monkeypatch, free) for free in (60, 50, 24, 8, 2.6, 2.2)] == \
        [1, 2, 4, 16, 128, 256]
    assert [fit(monkeypatch, 8, batch, world) for batch, world in
            ((30, 1), (31, 1), (60, 2), (62, 2))] == [1, 31, 1, 31]
    with pytest.raises(ValueError):
        fit(monkeypatch, 1.2)


def test_what_does_not_fit_says_what_it_needs_and_what_would(monkeypatch, capsys, tmp_path):
    flags = ["--res", "512", "--compile", "off", "--set", "bf16=off"]

    def said(free, *more):
        monkeypatch.setattr(memory, "available", lambda device: free * GB)
        error = one_line(capsys, train.main, [*flags, "--out", tmp_path / "run", *more])
        assert not (tmp_path / "run").exists()
        return error
    fixed, each, weights = needed(config_of("--res", "512", "--model", "paper"))
    assert 2.4e9 < weights < 2.5e9 and 36 * weights < fixed < 36 * weights + 1 * GB
    assert said(24, "--model", "paper") == \
        f"--res 512 --model paper: 2,455 M weights and one picture at a time need " \
        f"{(fixed + each) / GB:.3g} GB of memory, and 24 GB are free; --model base would fit\n"
    assert "; --recompute or --model small would fit" in said(16, "--model", "base")
    assert "; a smaller --res would fit" in said(.1, "--model", "tiny")
    assert "; a smaller --res would fit" in said(.1, "--model", "mini", "--res", "144")


def test_shards_are_advised_for_adam_alone(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 9.5 * GB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for optimizer in "adam", "muon":                # which needs whole matrices
        config = config_of("--model", "base", "--set", f"optimizer={optimizer}")
        with pytest.raises(ValueError) as error:
            memory.parts_that_fit(config, 10, 2, torch.device("cpu"), train.loss_function(config))
        assert ("--shard" in str(error.value)) == (optimizer == "adam")


def test_a_try_of_the_memory_is_of_all_pictures_with_all_else_that_training_needs(monkeypatch):
    net, given, limit = torch.nn.Linear(1, 1), [], 2000

    def forward(net, x, t, eps, cond):
        given.extend([x, *cond, eps, t])
        return net(x.mean()[None]).sum()

    def empty(count, honest=torch.empty, **options):
        if count > limit:
            raise torch.OutOfMemoryError("simulated")
        return honest(count, **options)
    monkeypatch.setattr(torch, "empty", empty)
    x, cond = torch.randn(1, 3, 4, 6), condition([3], [1], [[5, 6]])
    assert memory.fits(forward, net, x, cond, 5, limit)
    for one, many in zip([x, *cond], given):
        assert many.shape[0] == 5 and all(torch.equal(part, one[0]) for part in many)
    assert given[4].shape == x.repeat(5, 1, 1, 1).shape and given[5].shape == (5,)
    assert net.weight.grad is None                      # of a try nothing is learned
    assert not memory.fits(forward, net, x, cond, 5, limit + 1)


def test_two_parts_or_eight_learn_the_same_and_a_resumed_run_keeps_its_parts(
        tmp_path, little, monkeypatch, capsys):
    """To rounding where the memory differs from one run to the next; bit by bit within a run."""
    monkeypatch.setattr(memory, "BASE", 0)
    monkeypatch.setattr(memory, "REPORT", 0)
    fixed, each, _ = needed(config_of())

    def trained(name, pictures, steps):
        """With memory for so many pictures at a time."""
        monkeypatch.setattr(memory, "available",
                            lambda device: 2 * (fixed + each * pictures * 1.01))
        train.main([*BY_MEMORY, "--out", str(tmp_path / name), "--batch", "16", "--steps", steps])
        return last_checkpoint(tmp_path / name), capsys.readouterr().out
    saved = {}
    for at_a_time in (8, 2):
        saved[at_a_time], printed = trained(str(at_a_time), at_a_time, "3")
        assert f"Each step: 16 pictures in {16 // at_a_time} parts of {at_a_time} (" in printed
        assert saved[at_a_time]["at_a_time"] == at_a_time
    assert same_to_rounding(saved[8], saved[2])
    same = [torch.equal(saved[8]["model"][name], weights)
            for name, weights in saved[2]["model"].items()]
    assert not all(same)
    trained("run", 2, "2")
    again, printed = trained("run", 16, "3")
    assert all(torch.equal(again["model"][name], weights)
               for name, weights in saved[2]["model"].items())
    assert "Each step: 16 pictures in 8 parts of 2 (as it began)." in printed


def test_out_of_memory_on_one_of_two_ranks_makes_both_take_twice_the_parts(tmp_path, little):
    """Simulated on CPUs: rank 1 has no memory for more than two pictures at a time."""
    script = tmp_path / "small_gpu.py"
    script.write_text(f"""
import os, sys
sys.path[:0] = [{str(HERE)!r}]
import tests.little
import torch, memory, train
from tests.test_memory import config_of, needed
memory.RAISES.add("cpu")
fixed, each, _ = needed(config_of(), 2)
rank = int(os.environ["RANK"])
memory.available = lambda device: 2 * (fixed + (8, 4)[rank] * each * 1.01)  # rank 1: for half of it
honest, sizes = train.diffusion_loss, []
def full(net, x, *args, **options):
    sizes.append(len(x))
    if len(x) > 2 and rank == 1:
        raise torch.OutOfMemoryError("simulated")
    return honest(net, x, *args, **options)
train.diffusion_loss = full
train.main()
open({str(tmp_path)!r} + "/rank" + os.environ["RANK"], "w").write(str(sizes))
""")
    flags = ["--batch", "16", "--steps", "3", "--out"]
    said = run_ranks(2, script, *BY_MEMORY, *flags, tmp_path / "two")
    assert "Each step: 8 pictures on each rank in 4 parts of 2 (more did not fit)." in said
    # One picture is counted on each rank first, then 4, by rank 1's memory, and 2 are tried; then
    # there are 3 steps of 4 parts.
    for rank in (0, 1):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == [1, 4, 2] + 12 * [2]
    run_ranks(1, script, *SMALL, *flags, tmp_path / "one")
    one, two = last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "two")
    assert same_to_rounding(one, two)


def test_where_not_even_one_picture_fits_the_run_ends_with_a_line(
        tmp_path, little, monkeypatch, capsys):
    monkeypatch.setattr(run, "RAISES", {"cpu"})
    honest, flags = train.diffusion_loss, [*BY_MEMORY, "--steps", "1", "--out", tmp_path / "run"]
    flags = list(map(str, flags))

    def full(net, x, *args, **options):
        if x.device.type == "meta":
            return honest(net, x, *args, **options)
        raise RuntimeError("MPS backend out of memory (simulated)")
    monkeypatch.setattr(train, "diffusion_loss", full)
    with pytest.raises(SystemExit) as stop:
        train.main(flags)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and error.endswith(
        "out of memory even with one picture at a time; --recompute or a smaller --model takes "
        "less")
    monkeypatch.setattr(train, "diffusion_loss", lambda net, x, *args, **options: 1 / 0
                        if x.device.type == "cpu" else honest(net, x, *args, **options))
    with pytest.raises(ZeroDivisionError):
        train.main(flags)


def test_out_of_memory_in_the_midst_of_training_ends_with_a_line_that_says_how_to_go_on(
        tmp_path, little, monkeypatch, capsys):
    honest = train.diffusion_loss

    def full(*args, **options):
        if (tmp_path / "run/ckpt-00000002.pt").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
        return honest(*args, **options)
    monkeypatch.setattr(train, "diffusion_loss", full)
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "run", "--steps", "4", "--save-every", "1")
    assert stop.value.code == 1 and capsys.readouterr().err.splitlines()[-1] == \
        "out of memory (CUDA out of memory. Tried to allocate 2 GiB.): a larger --accum, more " \
        "parts than the start says, takes less; the same command with it goes on from the last " \
        f"checkpoint in {tmp_path}/run"
    monkeypatch.setattr(train, "diffusion_loss", honest)
    assert run_train(tmp_path / "run", "--steps", "4", "--accum", "2")["step"] == 4


# ---------------------------------------------------------------------------- the start

def test_the_model_is_laptop_without_cuda_and_the_start_says_what_it_would_be_with(
        tmp_path, little, monkeypatch, capsys):
    assert [ranks.default_model(res, cuda) for res in ("64", "128", "512")
            for cuda in (False, True)] == ["laptop", "laptop", "laptop", "base", "laptop", "base"]
    monkeypatch.setitem(uvit.PRESETS["mini"], "network", LITTLE)
    for i, (flags, said) in enumerate((("--res 72", True), ("--res 72 --model mini", False),
                                       ("--res 64", False))):
        run_train(tmp_path / str(i), "--steps", "1", "--batch", "1", *flags.split())
        words = "\nDefault --model at this size: laptop without CUDA, base with CUDA.\n"
        assert (words in capsys.readouterr().out) == said


def test_the_log_begins_with_the_first_step_and_a_first_grid_and_checkpoint_come_early(
        tmp_path, little, monkeypatch):
    monkeypatch.setattr(run, "REPORT_STEPS", 1)
    run_train(tmp_path, *"--batch 1 --steps 60 --log-every 40 --sample-every 100 --res 16".split())
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 40, 60]
    assert [line["step"] for line in log_lines(tmp_path, "loss_by_noise_level")] == [50, 60]
    assert Path(tmp_path, "grid-0000050.png").exists()
    assert Path(tmp_path, "ckpt-00000050.pt").exists()      # --save-every is 1000
