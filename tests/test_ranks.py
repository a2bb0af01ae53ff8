"""Many processes as one: DDP, shards, lost ranks."""
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import checkpoint
import data
import ranks
import sample as sampling
import train
from run import CHECKPOINTS
from tests.helpers import (HERE, LAUNCHERS, RUN, SMALL, TORCHRUN, TRAIN, assert_same_bits,
                           assert_same_run, last_checkpoint, linux, log_lines, one_line, processes,
                           run_ranks, run_script, same_to_rounding, start_script, wait_for,
                           write_folder)
from tests.test_memory import BY_MEMORY

BEGIN = f"import os, sys\nsys.path[:0] = [{str(HERE)!r}]\nimport tests.little\n"    # of a script


def rank_pid(torchrun, rank):
    found = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True)
    return next(int(pid) for pid in found.stdout.split()
                if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())


# ---------------------------------------------------------------------------- lost and stopped

@linux
def test_ranks_save_and_leave_when_torchrun_is_killed_or_one_of_them_is_stopped(
        tmp_path, unbroken):
    command = [*LAUNCHERS["two ranks"], TRAIN, *RUN, tmp_path]
    first = start_script(*command)
    wait_for(lambda: "loss=" in first.said(), first)
    first.kill()                            # torchrun alone: its ranks hold the folder until they
    second = start_script(*command)         # have left
    wait_for(lambda: "loss=" in second.said(), second)
    found = re.search(r"stopped and saved at step (\d+)", first.said())
    assert found and f"steps {found[1]} to 60" in second.said()
    os.kill(rank_pid(second, 1), signal.SIGTERM)
    assert second.wait(120) == 0 and "stopped and saved" in second.said(), second.said()
    run_script(*command)
    assert_same_run(unbroken("two ranks"), tmp_path)
    wait_for(lambda: not processes(tmp_path), seconds=120)


@linux
def test_lost_rank_is_named_and_torchrun_heals_by_max_restarts(tmp_path, unbroken):
    run = start_script(*LAUNCHERS["two ranks"], "--max-restarts=3", TRAIN, *RUN, tmp_path, "--set",
                       "timeout=.25")
    wait_for(lambda: list(tmp_path.glob(CHECKPOINTS)), run)
    os.kill(rank_pid(run, 1), signal.SIGSTOP)           # as good as cut off: it sends no more
    begin, stopped = time.time(), rank_pid(run, 1)
    wait_for(lambda: "no word from" in run.said(), run)
    assert time.time() - begin < 120                    # timeout
    assert re.search(r"rank 0 on \S+: no word from rank 1 on \S+; the same command goes on from "
                     f".*{tmp_path.name}", run.said())
    os.kill(stopped, signal.SIGKILL)                    # for which torchrun would take 30 s
    wait_for(lambda: run.said().count("Everything goes") == 2, run)
    os.kill(rank_pid(run, 0), signal.SIGKILL)
    assert run.wait(120) == 0 and run.said().count("Everything goes") == 3
    assert_same_run(unbroken("two ranks"), tmp_path)


def test_ranks_that_max_restarts_starts_again_find_no_address_of_before(tmp_path):
    script = tmp_path / "restarted.py"
    script.write_text(BEGIN + f"""
from pathlib import Path
from torch.distributed.distributed_c10d import _get_default_store
from ranks import Ranks
Ranks().join(timeout=1)
restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
Path({str(tmp_path)!r}, f"found-{{restarts}}").write_text(
    str([_get_default_store().check([key]) for key in ("0", "1")]))
_get_default_store().set(str(restarts), "an address")
sys.exit(restarts == 0)
""")
    run_script(*TORCHRUN, "--nproc_per_node=1", "--max-restarts=1", script)
    assert [(tmp_path / f"found-{i}").read_text() for i in (0, 1)] == [str([False, False])] * 2


def test_ranks_that_restart_wait_for_those_that_have_yet_to():
    store, minute = dist.HashStore(), timedelta(minutes=1)

    def arrive(rank):
        return pool.submit(ranks.store_of_those_here, store, rank, 2, minute)

    with ThreadPoolExecutor() as pool:
        before = [rank.result() for rank in [arrive(0), arrive(1)]]
        before[1].set("address", "of a rank that died")
        assert before[0].get("address") == b"of a rank that died"
        first = arrive(0)                   # the number of the dead rank 1 is still there
        time.sleep(1)
        assert not first.done()
        after = [rank.result() for rank in [first, arrive(1)]]
    after[0].set("there", "0")
    assert after[1].check(["there"]) and not after[1].check(["address"])
    with ThreadPoolExecutor() as pool:      # two processes with one rank: the older one leaves
        older = arrive(1)
        time.sleep(.2)
        newer, first = arrive(1), arrive(0)
        assert first.result() and newer.result()
        with pytest.raises(RuntimeError, match="another process is rank 1"):
            older.result()
    with pytest.raises(RuntimeError, match="same time"):
        ranks.store_of_those_here(store, 0, 2, timedelta(seconds=.2))


@pytest.mark.parametrize("lost, fate, seconds", [([2], "pass", 10), ([1, 2], "pass", 10),
                                                 ([2], "os._exit(0)", 60)],
                         ids=["one hung", "two hung", "one dead"])
def test_of_four_ranks_only_the_lost_are_named(tmp_path, lost, fate, seconds):
    left = sorted({0, 1, 2, 3} - {*lost})
    script = tmp_path / "probe.py"
    script.write_text(BEGIN + f"""
import time
from pathlib import Path
import torch.distributed as dist
from ranks import Ranks
ranks = Ranks()
ranks.join(timeout=10)
dist.barrier(ranks.control)
answers = [Path({str(tmp_path)!r}, f"unreachable-{{rank}}") for rank in {left}]
if ranks.rank in {lost}:
    {fate}
else:
    time.sleep(ranks.rank / 2)              # they do not find out at the same moment
    answer = Path({str(tmp_path)!r}, f"unreachable-{{ranks.rank}}")
    answer.write_text(str(ranks.unreachable({seconds})))
while not all(path.exists() for path in answers):       # one that leaves is lost to the others
    time.sleep(.1)
os._exit(0)
""")
    run_ranks(4, script)
    for rank in left:
        assert (tmp_path / f"unreachable-{rank}").read_text() == str(lost)


def test_sigterm_to_one_of_two_sharded_ranks_ends_their_report_together(tmp_path):
    script = tmp_path / "stopped.py"
    script.write_text(BEGIN + """
import signal
import socket
import run, train
honest = run.sampling_steps
def stopped_meanwhile(*args):
    for i, step in enumerate(honest(*args)):
        if os.environ["RANK"] == "1" and i == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        yield step
run.sampling_steps = stopped_meanwhile
train.main()
""")
    words = run_ranks(2, script, *SMALL, "--shard", "--steps", "2", "--sample-every", "1", "--out",
                      tmp_path / "run", "--set", "timeout=.25")
    assert "stopped and saved at step 2" in words or "done" in words, words
    assert not list((tmp_path / "run").glob("grid*"))


# ---------------------------------------------------------------------------- the same gradient

def test_two_ranks_checkpoint_goes_on_with_1_and_with_4(tmp_path, little):
    flags = [TRAIN, *SMALL, "--steps"]
    run_ranks(0, *flags, "4", "--out", tmp_path / "one")
    run_ranks(2, *flags, "2", "--out", tmp_path / "1")
    shutil.copytree(tmp_path / "1", tmp_path / "4")
    for count in "14":
        run_ranks(int(count), *flags, "4", "--out", tmp_path / count)
        assert same_to_rounding(last_checkpoint(tmp_path / "one"),
                                last_checkpoint(tmp_path / count))


@pytest.mark.parametrize("more", [[], ["--text", "bytes"], ["--set", "optimizer=muon"]],
                         ids=["class", "caption", "muon"])
def test_two_ranks_equal_one_process(tmp_path, little, more):
    flags = [*SMALL, "drop_label=.5", "--steps", "4", "--sample-every", "4", *more]
    run_ranks(0, TRAIN, *flags, "--out", tmp_path / "one")
    run_ranks(2, TRAIN, *flags, "--accum", "2", "--out", tmp_path / "two")
    one, two = last_checkpoint(tmp_path / "one"), last_checkpoint(tmp_path / "two")
    assert same_to_rounding(one, two)
    losses = [[line["loss"] for line in log_lines(tmp_path / name)] for name in ("one", "two")]
    assert np.allclose(*losses, rtol=1e-5)
    grids = [np.asarray(Image.open(tmp_path / name / "grid.png"), int) for name in ("one", "two")]
    assert np.abs(grids[0] - grids[1]).max() <= 2


def test_a_broken_picture_that_only_another_rank_met_is_named(tmp_path):
    """Picture 21: both ranks read the first 16, for the reports, and rank 1 has 20 to 23."""
    write_folder(tmp_path / "set", 40)
    names = data.Pictures(tmp_path / "set", 16).names
    name = names[np.random.default_rng((1, 0, 0)).permutation(40)[21]]
    (tmp_path / "set" / name).write_bytes(b"no picture")
    said = run_ranks(2, TRAIN, *SMALL, "--data", tmp_path / "set", "--res", "16", "--steps", "3",
                     "--out", tmp_path / "run")
    assert said.count(f"skipped {name}: Unid") == 1
    assert "1 of 40 pictures could not be read and were skipped" in said


def test_sharded_ranks_learn_from_captions_what_ddp_learns(tmp_path, little):
    flags = [TRAIN, *SMALL, "drop_label=.5", "--save-every", "1", "--text", "bytes", "--steps"]
    run_ranks(2, *flags, "4", "--out", tmp_path / "ddp")
    run_ranks(2, *flags, "3", "--shard", "--recompute", "--out", tmp_path / "shard")
    run_ranks(0, *flags, "4", "--out", tmp_path / "shard")      # goes on as one process
    ddp, shard = last_checkpoint(tmp_path / "ddp"), last_checkpoint(tmp_path / "shard")
    assert same_to_rounding(ddp, shard) and ddp["model"].keys() == shard["model"].keys()
    assert any(name.startswith("text.") for name in shard["model"])


def test_sharded_ranks_learn_what_ddp_learns_and_their_checkpoint_is_a_bare_whole_one(
        tmp_path, little, capsys):
    flags = [TRAIN, *SMALL, "drop_label=.5", "--save-every", "1", "--steps"]
    run_ranks(2, *flags, "4", "--out", tmp_path / "ddp")
    run_ranks(2, *flags, "3", "--shard", "--recompute", "--accum", "2", "--sample-every", "2",
              "--out", tmp_path / "shard")
    shutil.copytree(tmp_path / "shard", tmp_path / "one")
    run_ranks(2, *flags, "4", "--shard", "--out", tmp_path / "shard")           # goes on sharded,
    run_ranks(0, *flags, "4", "--sample-every", "2", "--out", tmp_path / "one")     # and as one
    ddp, shard, one = (last_checkpoint(tmp_path / name) for name in ("ddp", "shard", "one"))
    assert same_to_rounding(ddp, shard) and same_to_rounding(ddp, one)
    assert ddp["model"].keys() == shard["model"].keys() and ddp.keys() == shard.keys()
    parts = [[*saved["ema"].values(), *saved["optimizer"]["state"][0].values()]
             for saved in (ddp, shard)]
    assert len(parts[0]) == len(parts[1])
    assert all(type(b) is torch.Tensor and a.shape == b.shape for a, b in zip(*parts))
    reports = [log_lines(tmp_path / name, "loss_by_noise_level")[0] for name in ("shard", "one")]
    assert reports[0] == reports[1]
    assert Image.open(tmp_path / "shard/grid-0000002.png").size == (320, 128)
    sampling.main(["--ckpt", str(tmp_path / "shard/model.pt"), "--n", "2", "--steps", "2", "--out",
                   str(tmp_path / "pictures")])
    assert (tmp_path / "pictures/000001.png").exists()


# ---------------------------------------------------------------------------- shards

def test_each_rank_of_a_sharded_run_keeps_its_share_alone(tmp_path):
    script = tmp_path / "count.py"
    script.write_text(BEGIN + f"""
import torch, train
made, adam = [], torch.optim.Adam
torch.optim.Adam = lambda *args, **options: made.append(adam(*args, **options)) or made[0]
ema, honest = [], torch._foreach_lerp_
def counted(averages, *rest):
    ema.append(sum(p.numel() for p in averages))
    honest(averages, *rest)
torch._foreach_lerp_ = counted
train.main()
weights = [p.to_local() for p in made[0].param_groups[0]["params"]]
moments = [state["exp_avg"].to_local() for state in made[0].state.values()]
counts = [sum(t.numel() for t in tensors) for tensors in (weights, moments)] + ema
open({str(tmp_path)!r} + "/rank" + os.environ["RANK"], "w").write(str(counts))
""")
    run_ranks(2, script, *SMALL, "--shard", "--steps", "2", "--out", tmp_path / "run")
    counts = [json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1)]
    model = last_checkpoint(tmp_path / "run")["model"]
    whole = sum(weights.numel() for weights in model.values())
    assert all(a + b == whole and a < .6 * whole for a, b in zip(*counts)) and len(counts[0]) == 4


def test_weights_not_finite_in_one_share_alone_are_never_saved(tmp_path):
    script = tmp_path / "spoiled.py"
    script.write_text(BEGIN + """
import torch, train
honest = torch._foreach_lerp_
def spoiled(averages, weights, share):
    honest(averages, weights, share)
    if os.environ["RANK"] == "1":
        max(averages, key=torch.numel).view(-1)[0] = float("inf")
torch._foreach_lerp_ = spoiled
train.main()
""")
    words = run_ranks(2, script, *SMALL, "--shard", "--steps", "1", "--out", tmp_path / "run",
                      code=1)
    assert "weights are no longer finite, nothing was saved" in words
    assert not list((tmp_path / "run").glob("*.pt"))


# ---------------------------------------------------------------------------- checkpoints

def test_checkpoint_keys_are_bare_and_load_with_weights_only(tmp_path, little):
    run_script(*TORCHRUN, "--nproc_per_node=1", TRAIN, *SMALL, "--steps", "3", "--out", tmp_path)
    saved = last_checkpoint(tmp_path)
    names = set(checkpoint.build_network(**saved["network"]).state_dict())
    assert set(saved["model"]) == set(saved["ema"]) == names
    assert not any("module." in name or "_orig_mod." in name for name in names)
    model, small = checkpoint.load_model(tmp_path / "model.pt", "cpu")
    assert_same_bits(dict(model.state_dict()), saved["ema"])
    assert small["step"] == 3 and len(small["classes"]) == 10 and not model.training


@pytest.mark.parametrize("flags", [[], ["--shard"]], ids=["ddp", "shard"])
def test_nan_in_one_ranks_gradient_leaves_all_ranks_with_the_same_finite_weights(tmp_path, flags):
    script = tmp_path / "poisoned.py"
    script.write_text(BEGIN + f"""
import torch, train
from ranks import gather_full
honest, calls = train.diffusion_loss, []
def poisoned(*args, **options):
    calls.append(0)
    poison = float("nan") if os.environ["RANK"] == "1" and len(calls) in (2, 4) else 1
    return honest(*args, **options) * poison
train.diffusion_loss = poisoned
copied, nets = train.copy.deepcopy, []
def deepcopy(thing):
    copy = copied(thing)
    if isinstance(thing, torch.nn.Module):
        nets.extend([thing, copy])
    return copy
train.copy.deepcopy = deepcopy
leave = train.Ranks.wait_and_leave_group
def save_and_leave(self):
    states = [gather_full(net.state_dict()) for net in nets]
    torch.save(states, {str(tmp_path)!r} + "/rank" + os.environ["RANK"])
    leave(self)
train.Ranks.wait_and_leave_group = save_and_leave
train.main()
""")
    run_ranks(2, script, *SMALL, *flags, "--steps", "6", "--out", tmp_path / "run")
    first, second = (torch.load(tmp_path / f"rank{rank}") for rank in (0, 1))
    assert len(first) == 2
    assert_same_bits(first, second)
    assert all(torch.isfinite(weights).all() for state in first for weights in state.values())
    lines = log_lines(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)


# ---------------------------------------------------------------------------- wrong numbers

def test_batch_3_on_2_ranks_is_refused_once(tmp_path, little, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = one_line(capsys, train.main, [*SMALL, "--batch", "6", "--accum", "2", "--out",
                                          tmp_path / "run"])
    assert error == "--batch 6: must be a multiple of 4, 2 ranks x --accum 2\n"
    error = one_line(capsys, train.main, [*BY_MEMORY, "--batch", "3", "--out", tmp_path / "run"])
    assert error == "--batch 3: must be a multiple of 2, 2 ranks\n"
    monkeypatch.undo()
    output = run_script(*TORCHRUN, "--nproc_per_node=2", TRAIN, "--batch", "3", "--out",
                        tmp_path / "run", code=1)                       # the code of torchrun
    assert output.count(error) == 1 and "exitcode  : 2" in output


def test_a_gathered_copy_does_not_change_with_what_was_gathered():
    """What is written by a thread while training goes on; Adam's steps are not sharded."""
    tree = dict(weights=torch.ones(3), state={0: dict(step=torch.tensor(1.0))}, lr=.1)
    copy, same = ranks.gather_full(tree, copy=True), ranks.gather_full(tree)
    tree["weights"] += 1
    tree["state"][0]["step"] += 1
    assert copy["weights"].tolist() == [1, 1, 1] and copy["state"][0]["step"] == 1
    assert copy["lr"] == .1 and same["weights"] is tree["weights"]


def test_a_rank_whose_torchrun_died_while_it_started_ends_soon(monkeypatch):
    with socket.socket() as probe:          # a port that nobody listens on
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_WORLD_SIZE=2, MASTER_ADDR="127.0.0.1",
                            MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True",
                            TORCHELASTIC_RESTART_COUNT=0).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(ranks, "CONNECT_SECONDS", 1)
    start = time.time()
    with pytest.raises(RuntimeError):
        ranks.Ranks().join(timeout=30)      # minutes
    assert time.time() - start < 60
