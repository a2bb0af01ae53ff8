"""Runs that are killed, told to stop, or whose disk is full."""
import contextlib
import multiprocessing
import os
import re
import signal
import sys

import pytest

import checkpoint
import run
import train
from ranks import StopSignals
from tests.helpers import (LAUNCHERS, PYTHON, RUN, SMALL, TRAIN, assert_same_bits, assert_same_run,
                           full_disk, last_checkpoint, linux, log_lines, one_line, processes,
                           run_script, run_train, start_script, wait_for)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_killed_and_resumed_equals_unbroken_to_the_last_bit(tmp_path, unbroken, launcher):
    command = [*LAUNCHERS[launcher], TRAIN, *RUN, tmp_path]
    killed = start_script(*command)
    wait_for(lambda: (tmp_path / "ckpt-00000006.pt").exists(), killed)
    for pid in processes(tmp_path):                     # torchrun and its ranks at once
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert last_checkpoint(tmp_path)["step"] < 60
    assert re.search(r"steps (\d+) to 60", run_script(*command))[1] in map(str, range(6, 60, 2))
    assert "done" in run_script(*command)               # and once more
    assert_same_run(unbroken(launcher), tmp_path)
    losses = [[(line["step"], line["loss"]) for line in log_lines(folder)]
              for folder in (unbroken(launcher), tmp_path)]
    assert losses[0] == losses[1]


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_sigterm_and_ctrl_c_save_and_leave_with_code_0_within_one_step(tmp_path, unbroken, number):
    command = [*PYTHON, TRAIN, *RUN, tmp_path, "--set", "workers=2"]     # sent to these, too
    process = start_script(*command, "--save-every", "1000")
    wait_for(lambda: "loss=" in process.said(), process)
    os.killpg(process.pid, number)
    before = len(log_lines(tmp_path))
    assert process.wait(120) == 0 and "Traceback" not in process.said()
    step = checkpoint.read(tmp_path / "model.pt")["step"]
    assert before <= step <= before + 2
    assert f"stopped and saved at step {step}: the same command goes on" in process.said()
    wait_for(lambda: not processes(tmp_path), seconds=120)
    assert sorted(file.name for file in tmp_path.iterdir()) == \
        [f"ckpt-{step:08d}.pt", "index.html", "log.jsonl", "model.pt"]
    run_script(*command)
    assert_same_run(unbroken("one process"), tmp_path)


def test_sigterm_does_not_wait_for_the_report(tmp_path, little, monkeypatch, capsys):
    monkeypatch.setattr(run, "REPORT_STEPS", 5)
    honest, calls = run.sampling_steps, []

    def stopped_meanwhile(*args):
        signal.raise_signal(signal.SIGTERM)
        for step in honest(*args):
            calls.append(0)
            yield step
    monkeypatch.setattr(run, "sampling_steps", stopped_meanwhile)
    assert run_train(tmp_path, "--steps", "9", "--sample-every", "2")["step"] == 3
    assert "stopped and saved at step 3" in capsys.readouterr().out
    assert not list(tmp_path.glob("grid*")) and len(calls) == 1
    assert run_train(tmp_path, "--steps", "4", "--sample-every", "2")["step"] == 4
    assert not list(tmp_path.glob("grid*"))
    monkeypatch.setattr(run, "sampling_steps", honest)
    run_train(tmp_path, "--steps", "4", "--sample-every", "2")  # nothing left to do but the report
    assert [file.name for file in sorted(tmp_path.glob("grid*"))] == \
        ["grid-0000004.png", "grid.png"]
    assert len(log_lines(tmp_path, "loss_by_noise_level")) == 1
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@linux
@pytest.mark.parametrize("nohup", [False, True])
def test_stop_signals_are_noted_meanwhile_and_nohup_is_respected(nohup):
    before = signal.SIG_IGN if nohup else lambda number, frame: None
    original = signal.signal(signal.SIGHUP, before)
    try:
        with StopSignals() as signals:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.raise_signal(number)
        noted = [signal.SIGTERM, signal.SIGINT] + [signal.SIGHUP] * (not nohup)
        assert signals.received == noted and signal.getsignal(signal.SIGHUP) == before
    finally:
        signal.signal(signal.SIGHUP, original)


@linux
def test_a_closed_terminal_leaves_loaders_to_the_trainer():
    script = ("import os, signal; from ranks import ignore_stop_signals; ignore_stop_signals(); "
              "[os.kill(os.getpid(), n) for n in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)]; "
              "print('alive')")
    assert run_script(sys.executable, "-c", script) == "alive\n"


def test_one_command_at_a_time_trains_in_a_folder(tmp_path, little, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    held = checkpoint.lock(tmp_path / "run/log.jsonl")
    monkeypatch.setattr(run, "lock", lambda path, patience: checkpoint.lock(path, patience=0))
    error = one_line(capsys, train.main, [*SMALL, "--steps", "1", "--out", tmp_path / "run"])
    assert error == f"--out {tmp_path}/run: another process trains there; end that, or give a " \
        "new --out\n"
    held.close()
    run_train(tmp_path / "run", "--steps", "1")


def test_full_disk_leaves_the_last_good_checkpoint_and_the_run_goes_on(
        tmp_path, little, monkeypatch, capsys):
    unbroken = run_train(tmp_path / "unbroken", "--steps", "5", "--save-every", "1")
    honest = run.write

    def write(path, write_to, opener):
        full = re.search("ckpt-0000000[34]", str(path))
        with full_disk() if full else contextlib.nullcontext():
            honest(path, write_to, opener)
        assert not list(tmp_path.glob("run/*.pt.part"))
    monkeypatch.setattr(run, "write", write)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:             # the last save fails: nothing is done yet
        run_train(tmp_path / "run", "--steps", "4", "--save-every", "1")
    printed, error = capsys.readouterr()
    assert stop.value.code == 1 and error.splitlines()[-1] == \
        f"step 4: not saved; the last good checkpoint is {tmp_path}/run/ckpt-00000002.pt, and " \
        "the same command goes on from there"
    lines = [line for line in printed.splitlines() if "File too large" in line]
    assert len(lines) == 2 and lines[0].startswith("step 3: ")
    assert lines[0].endswith("the run goes on and will try again")
    assert [file.name for file in sorted(tmp_path.glob("run/ckpt*"))] == \
        ["ckpt-00000001.pt", "ckpt-00000002.pt"]
    assert checkpoint.read(tmp_path / "run/ckpt-00000002.pt")["step"] == 2
    monkeypatch.setattr(run, "write", honest)
    resumed = run_train(tmp_path / "run", "--steps", "5", "--save-every", "1")
    for part in ("step", "model", "ema", "optimizer"):
        assert_same_bits(unbroken[part], resumed[part])


@linux
def test_ctrl_c_saves_even_if_the_reader_of_the_output_is_gone(tmp_path):
    shell = f"{sys.executable} {TRAIN} {' '.join(RUN)} {tmp_path}/run --save-every 99 2>&1 " \
            f"| tee {tmp_path}/log > /dev/null"
    process = start_script("sh", "-c", shell)
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "loss=" in log.read_text(), process)
    os.killpg(process.pid, signal.SIGINT)
    wait_for(lambda: (tmp_path / "run/model.pt").exists() and not processes(tmp_path))
    step = checkpoint.read(tmp_path / "run/model.pt")["step"]
    assert step == last_checkpoint(tmp_path / "run")["step"] < 60


def test_run_leaves_no_file_process_or_open_file_behind(tmp_path, little, monkeypatch):
    monkeypatch.setattr(run, "REPORT_STEPS", 2)
    common = ["--save-every", "1", "--set"]
    run_train(tmp_path / "first", "--steps", "2", "--sample-every", "1", *common, "workers=1")
    before = os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []
    run_train(tmp_path / "run", "--steps", "6", "--sample-every", "2", *common, "workers=2")
    assert len(os.listdir("/proc/self/fd") if before else []) <= len(before)
    assert not multiprocessing.active_children() and not list(tmp_path.rglob("*.part"))
    for name in ("ckpt-00000099.pt", "model.pt", "grid-0000099.png"):
        (tmp_path / f"run/{name}.part").write_bytes(b"left by a kill")
    opened, lock = [], run.lock
    monkeypatch.setattr(run, "lock", lambda *args: opened.append(lock(*args)) or opened[0])
    run_train(tmp_path / "run", "--steps", "7")
    assert not list(tmp_path.rglob("*.part")) and opened[0].closed


def test_lines_of_the_log_after_the_last_checkpoint_are_written_anew(tmp_path, little):
    run_train(tmp_path, "--steps", "2")
    with open(tmp_path / "log.jsonl", "a") as log:      # left by a process that was killed
        log.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')
    run_train(tmp_path, "--steps", "4")
    lines = log_lines(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[2]["loss"] != 9
