"""Fixtures of test_all.py and tests/."""
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]
pytest.register_assert_rewrite("tests.helpers")

import uvit                                                                     # noqa: E402
from tests.helpers import LITTLE, RUN, TRAIN, run_ranks, run_train              # noqa: E402


@pytest.fixture(autouse=True)
def same_random_numbers():
    """In each test, whichever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def little(monkeypatch):
    """A network that trains in seconds in place of the default, for what runs in this process."""
    monkeypatch.setitem(uvit.PRESETS, "laptop", uvit.PRESETS["tiny"] | dict(network=LITTLE))


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory):
    """A run of `laptop` after one step, with the optimizer that `little` has."""
    out = tmp_path_factory.mktemp("runs") / "flowers"
    run_train(out, "--steps", "1", "--set", "optimizer=adam", "decay=0")
    return out


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """launcher -> the folder of a run by RUN that nothing disturbed."""
    folder, made = tmp_path_factory.mktemp("unbroken"), {}

    def run(launcher):
        if launcher not in made:
            made[launcher] = folder / launcher.split()[0]
            ranks = {"one process": 0, "two ranks": 2}[launcher]
            run_ranks(ranks, TRAIN, *RUN, made[launcher])
        return made[launcher]
    return run
