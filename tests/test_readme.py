"""README.md and docs/: their options, tables and code."""
import dataclasses
import re

import pytest
import torch

import config as config_module
import figures
import uvit
from tests.helpers import HERE, PYTHON, run_script

PAGES = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
ELSEWHERE = {"--nproc_per_node", "--nnodes", "--node-rank", "--master-addr", "--max-restarts",
             "--rdzv-backend", "--rdzv-endpoint", "--signals-to-handle", "--shutdown-timeout",
             "--shm-size", "--signal", "--no-deps"}     # of torchrun, Docker, Slurm, pip
SCRIPTS = ("train.py", "sample.py", "benchmarks/score.py", "benchmarks/ablations.py",
           "benchmarks/arguments.py", "benchmarks/samplers.py", "benchmarks/race.py run",
           "benchmarks/race.py score", "benchmarks/fid.py score")


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def options():
    """All options of the commands, as their --help lists them."""
    return {option for script in SCRIPTS
            for option in re.findall(r"--[a-z0-9-]+", run_script(*PYTHON, *script.split(),
                                                                 "--help"))}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_a_page_names_exists(page, options):
    page = page.read_text()
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", page))
    assert not named - options - ELSEWHERE - {"--set"}, named - options
    fields = {field.name for field in dataclasses.fields(config_module.Config)}
    settings = re.findall(r"--set((?: +[a-z][a-z0-9_]*=[^\s`]+)+)", page)
    names = {name for words in settings for name in re.findall(r"([a-z0-9_]+)=", words)}
    assert not names - fields, names - fields


def anchors(page):
    """Names of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_heading_that_a_page_links_to_exists(page):
    missing = []
    for link in re.findall(r'(?:\]\(|src=")([^)"\s]+)', page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if "://" not in link and not (target.exists()
                                      and (not anchor or anchor in anchors(target))):
            missing.append(link)
    assert not missing, missing


def test_table_of_sizes_in_the_readme_is_what_the_command_prints(capsys):
    figures.main(["sizes", "256"])
    table = capsys.readouterr().out
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(uvit.PRESETS)
    assert table in PAGES[0].read_text()


def test_training_step_quoted_in_the_readme_is_that_of_the_trainer():
    (code,) = [code for code in python_blocks(PAGES[0]) if ".backward()" in code]
    lines = lambda text: [line.strip() for line in re.sub("  +#.*", "", text).splitlines()
                          if line.strip()]
    step, trainer = lines(code), lines((HERE / "train.py").read_text())
    assert any(trainer[i:i + len(step)] == step for i in range(len(trainer)))


def test_sampling_from_python_draws_pictures(monkeypatch):
    """As a page has it, but for the number of steps."""
    monkeypatch.chdir(HERE)
    (code,) = [code for page in PAGES for code in python_blocks(page) if " sample(" in code]
    code, count = re.subn(r"noise, \d+, ", "noise, 4, ", code)
    assert count == 1
    exec(code, found := {})
    x = found["x"]
    assert x.shape == (4, 3, 128, 128) and x.abs().max() <= 1 and .05 < x.std() < .9
    assert not torch.equal(x[0], x[1])
