"""README.md: its flags, tables and code."""
import re

import torch

import data
import train
import uvit
from test_all import HERE, PARAMETERS, PYTHON, run_script


def test_every_flag_in_the_readme_exists():
    known = {"--nproc_per_node", "--nnodes", "--node-rank", "--master-addr", "--max-restarts", "--signals-to-handle",
             "--shutdown-timeout", "--shm-size"}    # torchrun's, Docker's
    for script in ("train.py", "sample.py", "benchmarks/score.py", "benchmarks/ablations.py", "benchmarks/arguments.py"):
        known |= set(re.findall(r"--[a-z0-9-]+", run_script(*PYTHON, script, "--help")))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", (HERE / "README.md").read_text()))
    assert named and not named - known, named - known


def test_what_to_expect_is_said_of_the_flowers_it_was_seen_with(capsys):
    model, flowers = uvit.UViT(64, **uvit.PRESETS["tiny"], classes=10), data.Flowers(64)
    for argv, expected in (([], True), (["--seed", "3", "--steps", "9", "--accum", "2"], True), (["--data", "emoji"], False), (["--lr", "1e-3"], False),
                           (["--batch", "16"], False), (["--schedule", "cosine"], False), (["--res", "32"], False), (["--blocks-16", "2"], False)):
        train.announce(train.parse_config(argv), model, flowers, 1, "cpu", 0, 1, "")
        assert ("What to expect" in capsys.readouterr().out) == expected, argv


def test_table_of_sizes_in_the_readme_is_the_presets():
    rows = re.findall(r"^\| `(\w+)` \| ([\d, ]+) \| ([\d, ]+) \| (\d+) \| ([\d,.]+) M \| ([\d,]+), ([\d,]+), ([\d.e-]+) \|",
                      (HERE / "README.md").read_text(), re.MULTILINE)
    assert [row[0] for row in rows] == list(uvit.PRESETS)
    number = lambda text: float(text.replace(",", ""))
    for name, widths, blocks, depth, weights, batch, steps, lr in rows:
        assert number(weights) == PARAMETERS[name]
        preset, default = uvit.PRESETS[name], train.DEFAULTS[name]
        assert [int(w) for w in widths.split(",")] == list(preset["widths"]) and int(depth) == preset["depth"]
        assert [int(b) for b in blocks.split(",")] == list(preset["blocks"])
        assert (number(batch), number(steps), number(lr)) == (default["batch"], default["steps"], default["lr"])


def test_python_of_the_readme_draws_pictures(monkeypatch):
    """As it stands there, but for the number of steps."""
    monkeypatch.chdir(HERE)
    (code,) = re.findall(r"^```python\n(.*?)^```", (HERE / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert code.count("noise, 128, ") == 1
    exec(code.replace("noise, 128, ", "noise, 4, "), found := {})
    x = found["x"]
    assert x.shape == (4, 3, 128, 128) and x.abs().max() <= 1 and .05 < x.std() < .9 and not torch.equal(x[0], x[1])
