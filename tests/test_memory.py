"""memory.py: parts of a batch that fit the memory there is."""
import json
from pathlib import Path

import pytest
import torch

import loss as losses
import memory
import sample as sampling
import train
from helpers import run_ranks
from test_all import (HERE, SMALL, last_checkpoint, log_lines, one_line, run_train,
                      same_to_rounding)

GB = 1e9


def kept_for_real(config, count):
    """Bytes of all storages that the backward pass of `count` pictures keeps, weights left out, run on a CPU."""
    model, kept = sampling.network(config, 10), {}
    own = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor      # held: an address is not used again
        return tensor
    if config["recompute"]:
        memory.recompute_blocks(model)
    x, t, logsnr = torch.rand(count, 3, config["res"], config["res"]), torch.rand(count), train.logsnr_schedule("shifted", config["res"], 32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses.diffusion_loss(model, x, t, torch.randn_like(x), logsnr, None, config["loss"], config["multiscale"] == "on")
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def config_of(*flags):
    config = vars(train.parse_config(["--res", "32", *flags]))
    return config | dict(bf16="off", compile="off")


@pytest.mark.parametrize("flags", [[], ["--text", "bytes"], ["--net", "unet", "--blocks-16", "2"], ["--skips", "level"], ["--res", "160", "--dropout", ".1"],
                                   ["--res", "64", "--multiscale", "on"], ["--loss", "sid2"]], ids=" ".join)
def test_what_is_kept_of_a_picture_is_what_autograd_keeps_of_one_more(little, flags):
    config = config_of(*flags)
    real = kept_for_real(config, 3) - kept_for_real(config, 2)
    with torch.device("meta"):
        counted = memory.kept_of_a_picture(sampling.network(config, 10), config)
    assert 1 <= counted / real < 1.3, (counted, real)        # norms on "meta" keep a little more


def test_recomputed_blocks_keep_their_input_and_the_largest_counts_once(little):
    def counted(blocks, recompute):
        config = config_of("--blocks-16", str(blocks))
        with torch.device("meta"):
            return memory.kept_of_a_picture(sampling.network(config, 10), config | dict(recompute=recompute))
    tokens, width = 16 * 16, 32
    assert counted(9, True) - counted(1, True) == 8 * 2 * 4 * tokens * width        # MLP and attention, float32
    inputs = 4 * (2 * tokens * width + 2 * 32 * 32 * 16)
    kept, block = {}, sampling.network(config_of(), 10).up[0][0]                    # of two blocks at 32 x 32 one with a skip
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.update({tensor.data_ptr(): tensor}) or tensor, lambda tensor: tensor):
        block(torch.randn(1, 16, 32, 32, requires_grad=True), torch.randn(1, 32), torch.randn(1, 16, 32, 32))
    largest = sum(tensor.nbytes for tensor in kept.values()) - 4 * sum(p.numel() for p in block.parameters())
    assert inputs + largest < counted(1, True) < .7 * counted(1, False)


def test_weights_gradient_moments_and_average_are_20_bytes_a_weight(little):
    beside = memory.BASE + 100 * 12 * 32 * 32
    fixed, each, weights = memory.needed(config_of(), 10, 1, "cpu")
    assert weights == sum(p.numel() for p in sampling.network(config_of(), 10).parameters()) and fixed == beside + 20 * weights
    half, less, _ = memory.needed(config_of() | dict(bf16="on", compile="on", shard=True), 10, 2, "cpu")
    ddp, compiled, _ = memory.needed(config_of() | dict(compile="on"), 10, 2, "cpu")
    assert ddp == beside + 24 * weights and compiled == .5 * each
    assert half == beside + 11 * weights and less == .75 * each


@pytest.mark.parametrize("version, files, room", [
    ("0::/a/b\n", {"memory.max": "max"}, float("inf")),
    ("0::/a/b\n", {"a/b/memory.max": "6000", "a/b/memory.current": "2500", "a/b/memory.stat": "anon 1\ninactive_file 500\n"}, 4000),
    ("0::/a/b\n", {"a/memory.max": "6000", "a/memory.current": "2500", "a/b/memory.max": "max", "a/b/memory.current": "100"}, 3500),
    ("0::/../c\n", {"memory.max": "900", "memory.current": "100"}, 800),
    ("9:cpu:/x\n4:memory:/a/b\n0::/\n", {"memory/a/b/memory.limit_in_bytes": "6000", "memory/a/b/memory.usage_in_bytes": "1000",
                                         "memory/a/b/memory.stat": "inactive_file 7\ntotal_inactive_file 150\ntotal_active_file 50\n"}, 5200),
    ("4:memory:/gone\n", {"memory/memory.limit_in_bytes": "700", "memory/memory.usage_in_bytes": "100"}, 600),
    ("", {}, float("inf"))], ids=["none", "own", "parent", "outside", "version 1", "in a container", "no groups"])
def test_limits_of_control_groups_are_those_of_the_group_and_all_around_it(tmp_path, version, files, room):
    (tmp_path / "self").write_text(version)
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    assert memory.cgroup_room(tmp_path / "fs", tmp_path / "self") == room


def test_ram_is_what_the_system_says_and_no_more_than_the_group_allows(monkeypatch):
    meminfo = memory.ram()
    assert .2e9 < meminfo < 1e13
    monkeypatch.setattr(memory, "cgroup_room", lambda: 5e8)
    assert memory.ram() == 5e8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(torch.device("cpu")) == 5e8 // 4


def fit(monkeypatch, free, batch=256, world=1, device="cpu", fixed=1 * GB, each=.1 * GB):
    monkeypatch.setattr(memory, "available", lambda device: free * GB)
    monkeypatch.setattr(memory, "needed", lambda *rest: (fixed, each, 50e6))
    config = config_of("--batch", str(batch))
    return memory.parts_that_fit(config, 10, world, torch.device(device))[0]


def test_parts_are_the_fewest_that_fit(monkeypatch):
    """A CPU gives half of what is free, for the rest is other programs', and no more than pays."""
    assert [fit(monkeypatch, 60, each=each) for each in (.005 * GB, .01 * GB, .1 * GB, 2 * GB)] == [1, 2, 32, 256]
    assert [fit(monkeypatch, free, device="cuda") for free in (800, 80, 29, 24, 8)] == [1, 1, 1, 2, 8]
    monkeypatch.setattr(memory, "CPU_PART", 1e12)
    assert [fit(monkeypatch, free) for free in (60, 50, 24, 8, 2.6, 2.2)] == [1, 2, 4, 16, 128, 256]
    assert [fit(monkeypatch, 8, batch, world) for batch, world in ((30, 1), (31, 1), (60, 2), (62, 2))] == [1, 31, 1, 31]
    with pytest.raises(ValueError):
        fit(monkeypatch, 1.2)


def test_what_does_not_fit_says_what_it_needs_and_what_would(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(memory, "available", lambda device: 24 * GB)
    flags = ["--bf16", "off", "--compile", "off", "--res", "512", "--out", str(tmp_path / "run")]
    error = one_line(capsys, train.main, ["--model", "paper", *flags])
    assert error == "--res 512 --model paper: 2,455 M weights and one picture at a time need 53.7 GB of memory, and 24 GB " \
        "are free; --model base would fit\n" and not (tmp_path / "run").exists()
    monkeypatch.setattr(memory, "available", lambda device: 9.6 * GB)
    assert "; --recompute or --model small would fit" in one_line(capsys, train.main, ["--model", "base", *flags])
    monkeypatch.setattr(memory, "available", lambda device: .1 * GB)
    assert "; a smaller --res would fit" in one_line(capsys, train.main, ["--model", "tiny", *flags])


def test_two_parts_or_eight_are_the_same_weights_and_a_resumed_run_keeps_its_parts(tmp_path, little, monkeypatch, capsys):
    """To rounding where the memory differs from one run to the next; to the last bit within a run."""
    train_auto = ["--accum", "0", "--batch", "16", "--steps"]
    monkeypatch.setattr(memory, "BASE", 0)
    monkeypatch.setattr(memory, "REPORT", 0)
    fixed, each, _ = memory.needed(config_of(), 10, 1, "cpu")
    free = lambda pictures: lambda device: 2 * (fixed + each * pictures * 1.01)
    saved = {}
    for at_a_time in (8, 2):
        monkeypatch.setattr(memory, "available", free(at_a_time))
        saved[at_a_time] = run_train(tmp_path / str(at_a_time), *train_auto, "3")
        assert f"Each step: 16 pictures in {16 // at_a_time} parts of {at_a_time} (" in capsys.readouterr().out
        assert saved[at_a_time]["at_a_time"] == at_a_time
    assert same_to_rounding(saved[8], saved[2]) and not all(torch.equal(*both) for both in zip(*(run["model"].values() for run in saved.values())))
    run_train(tmp_path / "run", *train_auto, "2")
    monkeypatch.setattr(memory, "available", free(16))
    again = run_train(tmp_path / "run", *train_auto, "3")
    assert all(torch.equal(again["model"][name], weights) for name, weights in saved[2]["model"].items())
    assert "Each step: 16 pictures in 8 parts of 2 (as it began)." in capsys.readouterr().out


def test_out_of_memory_on_one_of_two_ranks_makes_both_take_twice_the_parts(tmp_path, little):
    """Simulated on CPUs: rank 1 has no room for more than two pictures at a time."""
    script = tmp_path / "small_gpu.py"
    script.write_text(f"""
import os, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE / "tests")!r}]
import little, torch, memory, train
memory.RAISES.add("cpu")
fixed, each, _ = memory.needed(vars(train.parse_config({SMALL!r})), 10, 2, "cpu")
rank = int(os.environ["RANK"])
memory.available = lambda device: 2 * (fixed + (8, 4)[rank] * each * 1.01)       # rank 1 has room for half as many
honest, sizes = memory.diffusion_loss, []
def full(net, x, *rest):
    sizes.append(len(x))
    if len(x) > 2 and rank == 1:
        raise torch.OutOfMemoryError("simulated")
    return honest(net, x, *rest)
memory.diffusion_loss = full
train.main()
open({str(tmp_path)!r} + "/rank" + os.environ["RANK"], "w").write(str(sizes))
train.dist.destroy_process_group()
""")
    flags = [*SMALL, "--batch", "16", "--steps", "3", "--log-every", "1"]
    words = run_ranks(2, script, *flags, "--accum", "0", "--out", tmp_path / "two")
    assert "Each step: 8 pictures on each rank in 4 parts of 2 (more did not fit)." in words
    # One picture is counted on each rank first, then 4, by rank 1's memory, and 2 are tried.
    assert all(json.loads((tmp_path / f"rank{rank}").read_text()) == [1, 4, 2] for rank in (0, 1))
    run_ranks(1, script, *flags, "--accum", "1", "--out", tmp_path / "one")
    assert same_to_rounding(last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "two"))


def test_where_not_even_one_picture_fits_the_run_ends_with_a_line(tmp_path, little, monkeypatch, capsys):
    monkeypatch.setattr(memory, "RAISES", {"cpu"})
    monkeypatch.setattr(train, "RAISES", {"cpu"})
    honest = memory.diffusion_loss

    def full(net, x, *rest):
        if x.device.type == "meta":
            return honest(net, x, *rest)
        raise RuntimeError("MPS backend out of memory (simulated)")
    monkeypatch.setattr(memory, "diffusion_loss", full)
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "run", "--accum", "0", "--steps", "1")
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "out of memory even with one picture at a time; --recompute or a smaller --model" in error
    monkeypatch.setattr(memory, "diffusion_loss", lambda *args: 1 / 0 if args[1].device.type == "cpu" else honest(*args))
    with pytest.raises(ZeroDivisionError):
        run_train(tmp_path / "run", "--accum", "0", "--steps", "1")


def test_out_of_memory_in_the_midst_of_training_ends_with_a_line_that_says_how_to_go_on(tmp_path, little, monkeypatch, capsys):
    honest = train.diffusion_loss

    def full(*args):
        if (tmp_path / "run/ckpt-00000002.pt").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words")
        return honest(*args)
    monkeypatch.setattr(train, "diffusion_loss", full)
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path / "run", "--steps", "4", "--save-every", "1")
    assert stop.value.code == 1 and capsys.readouterr().err.splitlines()[-1] == \
        "out of memory (CUDA out of memory. Tried to allocate 2 GiB.): a larger --accum, more parts than the start says, takes less; the " \
        f"same command with it goes on from the last checkpoint in {tmp_path}/run"
    monkeypatch.setattr(train, "diffusion_loss", honest)
    assert run_train(tmp_path / "run", "--steps", "4", "--accum", "2")["step"] == 4


def test_the_model_is_tiny_without_cuda_and_the_start_says_what_it_would_be_with(tmp_path, little, monkeypatch, capsys):
    assert [train.default_model(res, cuda) for res in ("64", "128", "512") for cuda in (False, True)] == ["tiny", "tiny", "tiny", "base", "tiny", "base"]
    run_train(tmp_path / "run", "--steps", "1", "--res", "72", "--batch", "1")
    assert "\nDefault --model at this size: tiny without CUDA, base with CUDA.\n" in capsys.readouterr().out
    for flags in (["--res", "72", "--model", "mini"], ["--res", "64"]):
        train.announce(train.parse_config(flags), torch.nn.Linear(1, 1), train.Flowers(64), 1, "cpu", 0, 1, "")
        assert "Default --model" not in capsys.readouterr().out


def test_the_log_begins_with_the_first_step_and_a_first_grid_and_checkpoint_come_early(tmp_path, little, monkeypatch):
    monkeypatch.setattr(train, "REPORT_STEPS", 1)
    run_train(tmp_path, "--batch", "1", "--steps", "60", "--log-every", "40", "--sample-every", "100", "--res", "16")
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 40, 60]
    assert [line["step"] for line in log_lines(tmp_path, "loss_by_noise_level")] == [50, 60] and Path(tmp_path, "grid-0000050.png").exists()
    assert Path(tmp_path, "ckpt-00000050.pt").exists()          # --save-every is 1000
