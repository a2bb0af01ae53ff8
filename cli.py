"""The command line: options from the fields of a dataclass, errors in one line.

    @dataclass
    class Config:
        batch: int | None = option(None, "pictures a step (default: the model's)", least=1)

`parse(Config, argv)` reads the type, the default and the help of each field from there. A `listed`
field is an option of its own, --batch 8; every field can be set by --set batch=8.
"""
import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import types
from functools import partial


def fail(message, code=2, every_rank=False):
    """End with one line and no traceback. Code 2: wrong input; 1: anything else, as a full disk.

    every_rank: print it on each rank, since it may concern this one alone; else once a node.
    """
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        print(" ".join(str(message).splitlines()) + "\n", end="", file=sys.stderr, flush=True)
    raise SystemExit(code)


class IgnoreBrokenPipe:
    """stdout or stderr that goes on when its reader has left or its disk is full."""

    def __init__(self, file):
        self.file = file
        file.reconfigure(errors="backslashreplace")     # names of files may hold any bytes

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, text):
        try:
            self.file.write(text)
            self.file.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())
        return len(text)

    def flush(self):
        pass


# ---------------------------------------------------------------------------- values

def integer(text):
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number")


def number(text):
    try:
        if math.isfinite(float(text)):
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text}: must be a finite number")


def on_off(text):
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text}: must be one of on, off")
    return text == "on"


READERS = {int: integer, float: number, bool: on_off, str: str}


# ---------------------------------------------------------------------------- fields

def option(default, help, *, listed=False, choices=None, least=None, most=None, below=None,
           **metadata):
    """A field of a dataclass with all that the command line needs to know about it."""
    kind = dict(default_factory=lambda: list(default)) if isinstance(default, list) else \
        dict(default=default)
    return dataclasses.field(**kind, metadata=dict(
        help=help, listed=listed, choices=choices, least=least, most=most, below=below, **metadata))


flag = partial(option, listed=True)             # an option of its own


def without_none(kind):
    """int | None -> int; list[str] -> the same."""
    if isinstance(kind, types.UnionType):
        kind = next(part for part in kind.__args__ if part is not types.NoneType)
    return kind


def value_type(field):
    """int | None -> int; list[str] -> str; tuple[float, float] | None -> float."""
    kind = without_none(field.type)
    return kind.__args__[0] if isinstance(kind, types.GenericAlias) else kind


def written(field, value):
    """As the user would write it: --batch 8, --no-flip, or --set warmup=8."""
    name = field.name.replace("_", "-")
    if value is None:
        return f"the default of {field.name}"
    if field.type is bool and field.metadata["listed"]:
        return f"--{name}" if value else f"--no-{name}"
    value = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
    if field.metadata["listed"]:
        return f"--{name} {value}"
    return f"--set {field.name}={value}"


def check(config):
    """Exit with one line if a field is out of its bounds or not one of its choices."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if value is None:
            continue
        if limits["choices"] and value not in limits["choices"]:
            fail(f"{written(field, value)}: must be one of {', '.join(limits['choices'])}")
        if limits["least"] is not None and value < limits["least"]:
            fail(f"{written(field, value)}: must be at least {limits['least']}")
        if limits["most"] is not None and value > limits["most"]:
            fail(f"{written(field, value)}: must be at most {limits['most']}")
        if limits["below"] is not None and value >= limits["below"]:
            fail(f"{written(field, value)}: must be below {limits['below']}")


# ---------------------------------------------------------------------------- parsing

class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line: the argument, the value, what would be right."""

    def error(self, message):
        message = re.sub(r"^argument (\S+): ", r"\1 ", message)
        if message.startswith("unrecognized arguments"):
            word = (message.partition(": ")[2].split() or ["''"])[0]
            near = difflib.get_close_matches(word, self._option_string_actions, 1)
            message = f"{word}: no such argument, {near[0] if near else '--help'} is one"
        fail(message)


def parse(kind, argv, description):
    """argv -> a `kind`, a dataclass of `option`s. Wrong input: one line, exit code 2."""
    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    rest = [name for name, field in fields.items() if not field.metadata["listed"]]
    for name, field in fields.items():
        if field.metadata["listed"]:
            add(parser, field)
    if rest:
        about = "; ".join(f"{name}: {fields[name].metadata['help']}" for name in rest)
        parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                            help=f"any other setting. {about}".replace("%", "%%"))
    found = vars(parser.parse_args(argv))
    for setting in found.pop("set", []):
        name, equals, text = setting.partition("=")
        if not equals or name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            fail(f"--set {setting}: must be NAME=VALUE, and NAME one of "
                 f"{near[0] if near else ', '.join(rest)}")
        try:
            found[name] = READERS[value_type(fields[name])](text)
        except argparse.ArgumentTypeError as error:
            fail(f"--set {name}={error}")
    config = kind(**found)
    check(config)
    return config


def add(parser, field):
    """One listed field -> an argument of the parser."""
    whole, kind, default = without_none(field.type), value_type(field), field.default
    how = dict(type=READERS[kind])
    if field.type is bool:
        how = dict(action=argparse.BooleanOptionalAction if default else "store_true")
    elif isinstance(whole, types.GenericAlias):         # list[str], tuple[float, float]
        many = whole.__origin__ is list
        how |= dict(nargs="+" if many else len(whole.__args__),
                    metavar=field.metadata.get("metavar"))
    elif kind is bool:
        how |= dict(metavar="on|off")
    elif field.metadata["choices"]:
        how |= dict(metavar="|".join(field.metadata["choices"]))
    if default is dataclasses.MISSING:
        default = field.default_factory()
    text = field.metadata["help"]
    if "default" not in text and field.type is not bool and default not in ("", [], None):
        text += f" (default: {default})"
    parser.add_argument(f"--{field.name.replace('_', '-')}", default=default,
                        help=text.replace("%", "%%"), **how)
