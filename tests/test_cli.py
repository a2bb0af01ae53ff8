"""cli.py: a command line from the fields of a dataclass."""
import dataclasses
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest

import config as config_module
import cli
import sample as sampling
import train
from cli import option
from tests.helpers import HERE, PYTHON, one_line


@dataclass
class Config:
    name: str = option("rose", "any word", listed=True)
    size: int | None = option(None, "100% or less (default: by --rate)", listed=True, least=1,
                              most=100)
    rate: float = option(.5, "a share", listed=True, least=0, below=1)
    kind: str = option("round", "a shape", listed=True, choices=("round", "pointed"))
    flip: bool = option(True, "mirrored", listed=True)
    deep_water: bool = option(False, "in a pond", listed=True)
    compile: bool | None = option(None, "default: by the machine", listed=True)
    words: list[str] = option([], "some words", listed=True)
    pair: tuple[float, float] = option((1., 2.), "two numbers", listed=True)
    between: tuple[float, float] | None = option(None, "bounds", listed=True,
                                                 metavar=("LOW", "HIGH"))
    depth: int | None = option(None, "blocks", most=9)
    ema: float = option(.9, "decay of an average", least=0, below=1)
    bias: float | None = option(None, "any number")
    noisy: bool | None = option(None, "with noise")


def parse(*words):
    return cli.parse(Config, [str(word) for word in words], "Draw a flower.")


def refused(capsys, *words):
    return one_line(capsys, lambda argv: cli.parse(Config, argv, "Draw a flower."), words)


def test_without_arguments_every_field_has_its_default():
    assert parse() == Config() and parse().words is not parse().words


def test_arguments_are_read_by_the_annotations_of_their_fields():
    found = parse("--name", 7, "--size", 8, "--rate", ".25")
    assert (found.name, found.size, found.rate) == ("7", 8, .25)
    assert type(found.size) is int and type(parse("--rate", 0).rate) is float
    assert parse("--rate", "1e-3").rate == .001 and parse("--size", "007").size == 7


def test_none_stands_for_a_default_that_is_found_later_and_is_not_out_of_bounds():
    assert parse().size is None and parse().compile is None and parse().between is None
    assert parse("--set", "depth=3").bias is None


def test_switches_are_flags_where_a_default_is_known_and_on_or_off_where_it_is_not(capsys):
    assert parse().flip and not parse("--no-flip").flip and parse("--no-flip", "--flip").flip
    assert not parse().deep_water and parse("--deep-water").deep_water
    assert [parse("--compile", word).compile for word in ("on", "off")] == [True, False]
    assert [parse("--set", f"noisy={word}").noisy for word in ("on", "off")] == [True, False]
    assert [parse("--set", f"flip={word}").flip for word in ("on", "off")] == [True, False]
    for word in ("yes", "True", "1", ""):
        assert refused(capsys, "--compile", word) == f"--compile {word}: must be one of on, off\n"
        assert refused(capsys, "--set", f"noisy={word}") == \
            f"--set noisy={word}: must be one of on, off\n"


def test_lists_take_one_or_more_values_and_tuples_as_many_as_they_have(capsys):
    assert parse("--words", "a red flower").words == ["a red flower"]
    assert parse("--words", "one", "two", "--size", 3).words == ["one", "two"]
    assert list(parse("--pair", 3, "-40").pair) == [3., -40.]
    assert list(parse("--between", "-3", 5).between) == [-3., 5.]
    assert refused(capsys, "--words") == "--words expected at least one argument\n"
    assert refused(capsys, "--between", 1) == "--between expected 2 arguments\n"
    assert refused(capsys, "--pair", 1) == "--pair expected 2 arguments\n"
    assert refused(capsys, "--between", 1, "x") == "--between x: must be a finite number\n"


def test_set_takes_every_field_listed_or_not_and_many_at_once():
    found = parse("--set", "depth=3", "ema=.5", "--rate", ".1", "--set", "size=9", "bias=-4")
    assert found == Config(depth=3, ema=.5, rate=.1, size=9, bias=-4.)
    assert parse("--size", 3, "--set", "size=4").size == 4      # the later one counts
    assert parse("--set", "name=a=b").name == "a=b" and parse("--set", "name=").name == ""


def test_an_unknown_name_suggests_a_near_one(capsys):
    assert refused(capsys, "--sise", 3) == "--sise: no such argument, --size is one\n"
    assert refused(capsys, "--depth", 3).startswith("--depth: no such argument, ")
    assert refused(capsys, "flowers") == "flowers: no such argument, --help is one\n"
    assert refused(capsys, "--set", "dept=3") == \
        "--set dept=3: must be NAME=VALUE, and NAME one of depth\n"
    assert refused(capsys, "--set", "sise=3") == \
        "--set sise=3: must be NAME=VALUE, and NAME one of size\n"
    assert refused(capsys, "--set", "xyzzy=3") == \
        "--set xyzzy=3: must be NAME=VALUE, and NAME one of depth, ema, bias, noisy\n"
    assert refused(capsys, "--set", "depth").startswith("--set depth: must be NAME=VALUE")
    assert refused(capsys, "--siz", 3).startswith("--siz: no such argument")    # not cut short


def test_values_out_of_bounds_are_named_as_they_would_be_written(capsys):
    assert refused(capsys, "--size", 0) == "--size 0: must be at least 1\n"
    assert refused(capsys, "--size", 101) == "--size 101: must be at most 100\n"
    assert refused(capsys, "--rate", 1) == "--rate 1.0: must be below 1\n"
    assert refused(capsys, "--rate", "-.1") == "--rate -0.1: must be at least 0\n"
    assert refused(capsys, "--set", "depth=10") == "--set depth=10: must be at most 9\n"
    assert refused(capsys, "--set", "ema=1") == "--set ema=1.0: must be below 1\n"
    assert refused(capsys, "--kind", "square") == \
        "--kind square: must be one of round, pointed\n"
    assert parse("--size", 100, "--rate", 0, "--set", "depth=9", "ema=0") == \
        Config(size=100, rate=0., depth=9, ema=0.)


def test_what_is_no_number_is_refused(capsys):
    for word in ("3.5", "1e3", "three", ""):
        assert refused(capsys, "--size", word) == f"--size {word}: must be a whole number\n"
        assert refused(capsys, "--set", f"depth={word}") == \
            f"--set depth={word}: must be a whole number\n"
    for word in ("nan", "inf", "1e999", "much"):
        assert refused(capsys, "--rate", word) == f"--rate {word}: must be a finite number\n"
        assert refused(capsys, "--set", f"bias={word}") == \
            f"--set bias={word}: must be a finite number\n"


def test_written_is_what_the_user_would_type():
    fields = {field.name: field for field in dataclasses.fields(Config)}
    expected = dict(size=(8, "--size 8"), deep_water=(True, "--deep-water"),
                    compile=(False, "--compile off"), depth=(3, "--set depth=3"),
                    noisy=(True, "--set noisy=on"), bias=(-4.0, "--set bias=-4.0"))
    for name, (value, words) in expected.items():
        assert cli.written(fields[name], value) == words
        assert getattr(parse(*words.split()), name) == value
    assert cli.written(fields["deep_water"], False) == "--no-deep-water"
    assert cli.written(fields["depth"], None) == "the default of depth"


@pytest.mark.parametrize("kind, command", [
    (Config, lambda argv: cli.parse(Config, argv, "Draw a flower.")),
    (config_module.Config, train.main), (config_module.SamplingOptions, sampling.main)],
    ids=["example", "train.py", "sample.py"])
def test_help_lists_every_option_with_its_default_and_all_other_fields_under_set(
        kind, command, capsys):
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    printed, error = capsys.readouterr()
    assert not stop.value.code and not error
    printed = " ".join(printed.partition("\noptions:")[2].split())
    options, _, others = printed.partition("--set NAME=VALUE")
    for field in dataclasses.fields(kind):
        about = " ".join(field.metadata["help"].split())
        assert about, field.name
        if field.metadata["listed"]:
            flag = f"--{field.name.replace('_', '-')}"
            entry = options[options.index(f" {flag}"):].partition(about)
            assert entry[1] and "(default" not in entry[0], field.name
            default = field.default if field.default is not dataclasses.MISSING else []
            if isinstance(default, (int, float, str)) and default not in ("", True, False):
                assert entry[2].startswith(f" (default: {default})") or "default" in about, flag
        else:
            assert f"{field.name}: {about}" in others, field.name
    assert ("--set" in printed) == any(not f.metadata["listed"] for f in dataclasses.fields(kind))


def test_train_lists_about_20_options_and_every_field_says_what_it_is():
    fields = dataclasses.fields(config_module.Config)
    listed = [field for field in fields if field.metadata["listed"]]
    assert 15 <= len(listed) <= 25
    for field in [*fields, *dataclasses.fields(config_module.SamplingOptions)]:
        assert re.search(r"\w", field.metadata["help"]) and cli.value_type(field) in cli.READERS


def test_an_error_is_one_line_and_without_a_traceback_and_once_a_node(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.fail("two\nlines")
    assert stop.value.code == 2 and capsys.readouterr().err == "two lines\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    for every_rank, words in ((False, ""), (True, "no GPU\n")):
        with pytest.raises(SystemExit) as stop:
            cli.fail("no GPU", 1, every_rank=every_rank)
        assert stop.value.code == 1 and capsys.readouterr().err == words


# ---------------------------------------------------------------------------- output

@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("output", ["reader gone", "/dev/full"])
def test_output_that_nobody_can_take_does_not_end_a_program(tmp_path, output):
    code = ("import sys, pathlib, cli; sys.stdout = cli.IgnoreBrokenPipe(sys.stdout); "
            f"print('one'); print('two'); pathlib.Path({str(tmp_path / 'done')!r}).touch()")
    if output == "reader gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(output, os.O_WRONLY)
    done = subprocess.run([*PYTHON, "-c", code], cwd=HERE, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"") and (tmp_path / "done").exists()
