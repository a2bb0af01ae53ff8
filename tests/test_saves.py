"""When checkpoints are due; a thread writes copies of them while training goes on."""
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import config
import run
import train
from tests.helpers import SMALL, assert_same_bits, full_disk, run_train


def slow_writes(monkeypatch, until):
    """Let each file wait for until(): -> [(path, steps that were taken when it was whole)]."""
    written, honest, steps = [], run.write, []
    counted = run.Run.after_step
    monkeypatch.setattr(run.Run, "after_step", lambda self, *args: (counted(self, *args),
                                                                    steps.append(self.done)))

    def write(path, write_to, opener):
        until(steps)
        honest(path, write_to, opener)
        written.append((path.name, len(steps)))
    monkeypatch.setattr(run, "write", write)
    return written


def test_training_goes_on_while_a_checkpoint_is_written_and_it_holds_the_weights_of_its_step(
        tmp_path, little, monkeypatch):
    until_step_5 = run_train(tmp_path / "five", "--steps", 5)

    def wait_for_step_8(steps):
        end = time.time() + 60
        while len(steps) < 8 and time.time() < end:
            time.sleep(.01)
    written = slow_writes(monkeypatch, wait_for_step_8)
    ends = run_train(tmp_path / "ten", "--steps", 10, "--save-every", 5)
    assert [(name, steps >= 8) for name, steps in written] == [
        (name, True) for name in ("model.pt", "ckpt-00000005.pt", "model.pt", "ckpt-00000010.pt")]
    fifth = checkpoint.read(tmp_path / "ten" / "ckpt-00000005.pt")
    for part in ("model", "ema", "optimizer"):
        assert_same_bits(fifth[part], until_step_5[part])
    assert (fifth["step"], ends["step"]) == (5, 10)
    assert not torch.equal(fifth["model"]["position"], ends["model"]["position"])


def test_one_checkpoint_at_a_time_and_all_are_written_in_the_end(tmp_path, little, monkeypatch):
    third, at_work = run_train(tmp_path / "third", "--steps", 3), []

    def alone(steps):
        at_work.append(threading.current_thread())
        time.sleep(.2)
    written = slow_writes(monkeypatch, alone)
    out = tmp_path / "run"
    run_train(out, "--steps", 4, "--save-every", 1)
    assert [name for name, _ in written if name != "model.pt"] == \
        [f"ckpt-{step:08d}.pt" for step in (1, 2, 3, 4)]
    assert sorted(file.name for file in out.glob("ckpt*")) == \
        ["ckpt-00000003.pt", "ckpt-00000004.pt"]
    assert_same_bits(checkpoint.read(out / "ckpt-00000003.pt")["model"], third["model"])
    assert len(set(at_work)) == 1 and at_work[0] is not threading.main_thread()


def test_an_error_of_the_thread_that_is_not_of_the_disk_ends_the_run(tmp_path, little, monkeypatch):
    def broken(steps):
        raise RuntimeError("no such thing")
    slow_writes(monkeypatch, broken)
    with pytest.raises(RuntimeError, match="no such thing"):
        run_train(tmp_path, "--steps", 2, "--save-every", 1)


def test_checkpoints_are_due_by_the_clock_and_never_while_one_is_written(
        tmp_path, little, monkeypatch):
    clock, busy, saved = [0.0], [], []
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    honest_step, honest_save = run.Run.after_step, run.Run.save

    def after_step(self, *args):
        clock[0] += 60                                  # a minute a step
        if 7 <= self.done < 9:
            busy.append(self.writing)
            self.writing = None if self.writing is None else type(
                "Busy", (), dict(done=lambda _: False, result=lambda _: True))()
        elif busy:
            self.writing = busy[0]
        honest_step(self, *args)
    monkeypatch.setattr(run.Run, "after_step", after_step)
    monkeypatch.setattr(run.Run, "save", lambda self: (honest_save(self),
                                                       self.last_save_is_written(),
                                                       saved.append(self.done)))
    run_train(tmp_path, "--steps", 12, "--save-minutes", 2)
    assert saved == [2, 4, 6, 10, 12]                   # 8 and 9: still being written


def test_large_models_are_saved_by_the_clock_small_ones_every_250_steps_too():
    for flags, expected in ((["--model", "laptop"], (250, None)),
                            (["--model", "mini"], (250, None)),
                            (["--model", "small"], (None, None)),
                            (["--model", "base", "--sample-every", "0"], (None, 0)),
                            (["--model", "paper", "--save-every", "9"], (9, None)),
                            (["--model", "tiny", "--sample-every", "0"], (250, 0))):
        found = config.parse_config(flags)
        assert (found.save_every, found.sample_every, found.save_minutes) == (*expected, 15)


def test_without_a_number_of_steps_a_grid_comes_with_each_checkpoint(tmp_path, little, monkeypatch):
    monkeypatch.setattr(config, "QUICK", ())
    monkeypatch.setattr(run, "REPORT_STEPS", 1)
    flags = " ".join(SMALL).replace("--sample-every 0", "").split()
    train.main([*flags, "--out", str(tmp_path), "--steps", "7", "--save-every", "3"])
    assert sorted(file.name for file in tmp_path.glob("grid-*")) == \
        [f"grid-{step:07d}.png" for step in (3, 6, 7)]


def test_a_host_copy_is_apart_and_its_memory_is_used_again():
    tree = dict(a=torch.ones(3), b=dict(c=torch.zeros(2, dtype=torch.int64), d="word"), e=[1])
    copy = checkpoint.host_copy(tree)
    tree["a"] += 1
    assert copy["a"].tolist() == [1, 1, 1] and copy["b"]["d"] == "word" and copy["e"] == [1]
    places = copy["a"].data_ptr(), copy["b"]["c"].data_ptr()
    tree["b"]["d"], tree["new"] = "other", torch.ones(1)
    again = checkpoint.host_copy(tree, copy)
    assert again["a"].tolist() == [2, 2, 2] and again["b"]["d"] == "other" and again["new"] == 1
    assert (again["a"].data_ptr(), again["b"]["c"].data_ptr()) == places
    wider = checkpoint.host_copy(dict(a=torch.ones(5)), again)
    assert wider["a"].tolist() == [1] * 5



@pytest.mark.parametrize("on", ["disk", "a disk without O_DIRECT", "a system without O_DIRECT"])
@pytest.mark.parametrize("size", [0, 1, 4096, 2**23 - 1, 2**23, 2**24 + 4097])
def test_a_file_past_the_cache_is_the_file_that_open_writes(tmp_path, monkeypatch, size, on):
    if on == "a system without O_DIRECT":
        monkeypatch.setattr(checkpoint, "fcntl", None)
    if on == "a disk without O_DIRECT":
        monkeypatch.setattr(checkpoint, "fcntl", SimpleNamespace(
            F_GETFL=0, F_SETFL=0, fcntl=always(OSError(22, "Invalid argument"))))
    content = torch.randint(256, (size,), dtype=torch.uint8).numpy().tobytes()
    path = tmp_path / "file"

    def fill(file):
        for start in range(0, size, 3_000_001):
            assert file.write(content[start:start + 3_000_001]) == \
                len(content[start:start + 3_000_001])
    checkpoint.write(path, fill, checkpoint.Uncached)
    assert path.read_bytes() == content
    tensors = dict(a=torch.randn(3, 5), b=torch.arange(2_500_000))
    checkpoint.write(path, lambda file: torch.save(tensors, file), checkpoint.Uncached)
    assert_same_bits(torch.load(path), tensors)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT on this system")
def test_blocks_pass_the_cache_where_the_disk_allows_it(tmp_path):
    probe = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT)
    try:
        checkpoint.fcntl.fcntl(probe, checkpoint.fcntl.F_SETFL, os.O_DIRECT)
    except OSError:
        pytest.skip("not on this disk")
    with checkpoint.Uncached(tmp_path / "file") as file:
        flags = checkpoint.fcntl.fcntl(file.raw, checkpoint.fcntl.F_GETFL)
        assert file.direct and flags & os.O_DIRECT
        file.write(b"the end is written when the file is closed")
    assert (tmp_path / "file").read_bytes() == b"the end is written when the file is closed"


def test_what_fills_a_file_past_the_cache_may_fail_with_words_of_its_own(tmp_path):
    def fill(file):
        file.write(b"some")
        raise RuntimeError("of its own")
    with pytest.raises(RuntimeError, match="of its own"):
        checkpoint.write(tmp_path / "file", fill, checkpoint.Uncached)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_disk_is_raised_past_the_cache_too(tmp_path):
    path = tmp_path / "file"
    checkpoint.write(path, lambda file: file.write(b"old"), checkpoint.Uncached)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        checkpoint.write(path, lambda file: torch.save(torch.zeros(9_000_000), file),
                         checkpoint.Uncached)
    assert [file.name for file in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    with pytest.raises(OSError):            # EINVAL of another cause is not tried for ever
        with checkpoint.Uncached(path) as file:
            file.raw = SimpleNamespace(write=always(OSError(22, "Invalid argument")),
                                       close=file.raw.close, fileno=file.raw.fileno)
            file.write(b"new")
            file.flush()


def test_a_disk_that_takes_a_part_of_what_it_is_given_gets_the_rest(tmp_path):
    content = torch.randint(256, (9_000_001,), dtype=torch.uint8).numpy().tobytes()
    with checkpoint.Uncached(tmp_path / "file") as file:
        raw = file.raw
        file.raw = SimpleNamespace(write=lambda rest: raw.write(rest[:4096]), close=raw.close,
                                   fileno=raw.fileno)
        file.write(content)
        file.flush()
    assert (tmp_path / "file").read_bytes() == content


def always(error):
    def fail(*_):
        raise error
    return fail
