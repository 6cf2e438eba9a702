"""Command lines made from frozen dataclasses: a field is a flag, a section is a group of flags.

    @dataclass(frozen=True)
    class OptimConfig:
        learning_rate: float = flag(1e-8, "optimizer's rate", check=ABOVE_ZERO)

    config = parse(OptimConfig, argv, "train.py", "What the program does.")

The type says how a value is read (str, int, float, Path, bool for a switch, each of them or None, a
tuple for several values); `flag` says the rest. A field that holds another such dataclass is a
section. The names of all flags of a program differ, so that its values also travel as one flat dict
(`flat`, `from_flat`), as config.json, checkpoints, configuration files and sweeps keep them.
"""

from __future__ import annotations

import argparse
import math
import os
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar

from sdpo.common.cli import Parser, as_argv
from sdpo.common.errors import UserError, first_line

T = TypeVar("T")


@dataclass(frozen=True)
class Check:
    """A range: `holds` says whether a value lies in it, `text` completes "--name must ..."."""

    text: str
    holds: Callable[[Any], bool]


def at_least(least: int) -> Check:
    """The range of integers from `least` on."""
    return Check(f"be at least {least}", lambda value: value >= least)


def multiple_of(step: int) -> Check:
    """The range of positive multiples of `step`."""
    return Check(f"be a multiple of {step}", lambda value: value % step == 0)


def at_most(most: int) -> Check:
    """The range of integers up to `most`."""
    return Check(f"be at most {most}", lambda value: value <= most)


NOT_NEGATIVE = Check("be a number of at least 0", lambda v: math.isfinite(v) and v >= 0)
ABOVE_ZERO = Check("be a number above 0", lambda v: math.isfinite(v) and v > 0)
SHARE = Check("lie between 0 and 1", lambda v: 0.0 <= v <= 1.0)
BELOW_ONE = Check("be at least 0 and below 1", lambda v: 0.0 <= v < 1.0)
FINITE = Check("be a number", math.isfinite)
# What tensors hold: optimizers and losses convert what is given to float32.
_OF_FLOAT32 = Check("be at most 3.4e38 in size, as float32 is", lambda v: abs(v) <= 3.4e38)


@dataclass(frozen=True)
class _About:
    help: str
    metavar: str | None
    choices: tuple[str, ...] | None
    checks: tuple[Check, ...]
    name: str | None
    shown: str | None
    replaces: str | None
    required: bool
    positional: bool
    extend: bool
    expand: bool
    lines: bool
    record: bool
    empty: bool


def flag(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    check: Check | tuple[Check, ...] = (),
    name: str | None = None,
    shown: str | None = None,
    replaces: str | None = None,
    required: bool = False,
    positional: bool = False,
    extend: bool = False,
    expand: bool = False,
    lines: bool = False,
    record: bool = True,
    empty: bool = False,
) -> Any:
    """Declare a dataclass field as a flag.

    Args:
        default: its value where it is not given.
        help: the help text; a default other than None, False and () is added to it.
        metavar: what stands for its value in the help.
        choices: the values it can have.
        check: the ranges it must lie in; of several values each, and None always does.
        name: the flag's name, where it is not the field's.
        shown: the default as the help names it, where it depends on other flags.
        replaces: a flag that this one takes the place of: of the two the last one given counts.
        required: it must be given.
        positional: it is an argument without a name.
        extend: given several times, the values add up.
        expand: it is a path whose ~ is expanded, also in --flag=~/dir, which shells leave as it is.
        lines: a single value that ends in .txt is a file with a value a line.
        record: whether it is part of `flat`.
        empty: it can be given without any value, a path as "", for none.
    """
    checks = check if isinstance(check, tuple) else (check,)
    about = _About(
        help,
        metavar,
        tuple(choices) if choices else None,
        checks,
        name,
        shown,
        replaces,
        required,
        positional,
        extend,
        expand,
        lines,
        record,
        empty,
    )
    return field(default=default, metadata={"flag": about})


def _kind(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether the field holds several."""
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        (hint,) = (part for part in typing.get_args(hint) if part is not NoneType)
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    if typing.get_origin(hint) is typing.Literal:
        return str, False
    return hint, False


def _members(cls: type) -> Iterator[tuple[Field[Any], type | None, tuple[type, bool]]]:
    """Each field of a dataclass, the section it holds or None, and its type."""
    hints = typing.get_type_hints(cls)
    for member in fields(cls):
        if is_dataclass(hints[member.name]):
            yield member, hints[member.name], (object, False)
        elif "flag" in member.metadata:
            yield member, None, _kind(hints[member.name])


def _about(member: Field[Any]) -> _About:
    about: _About = member.metadata["flag"]
    return about


def _name(member: Field[Any]) -> str:
    return _about(member).name or member.name


def flag_names(cls: type) -> dict[str, str]:
    """Name the flags of a dataclass, each with the field of its section ("" at the top)."""
    names = {}
    for member, inner, _ in _members(cls):
        if inner is None:
            names[_name(member)] = ""
        else:
            names |= dict.fromkeys(flag_names(inner), member.name)
    return names


def add_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup, cls: type) -> None:
    """Add a dataclass's flags to a parser, those of a section as a group of its own.

    None of them has a default there: a namespace holds what was given.
    """
    for member, inner, (kind, several) in _members(cls):
        if inner is not None:
            add_flags(parser.add_argument_group(member.name), inner)
            continue
        about = _about(member)
        options: dict[str, Any] = {"help": _help_text(member), "default": argparse.SUPPRESS}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "metavar": about.metavar}
            if about.choices:
                del options["metavar"]
                options["choices"] = about.choices
            if several:
                none = about.empty or (about.positional and not about.required)
                options["nargs"] = "*" if none else "+"
            if about.extend:
                options["action"] = "extend"
            if about.replaces:
                options["action"] = _replacing(about.replaces)
        if about.positional:
            parser.add_argument(member.name, **options)
        else:
            parser.add_argument(f"--{_name(member)}", dest=_name(member), **options)


def _help_text(member: Field[Any]) -> str:
    about, default = _about(member), member.default
    if about.shown is None and (default is None or default is False or default in ("", ())):
        return about.help
    if isinstance(default, float) and default.is_integer():
        default = int(default)
    shown = about.shown or (" ".join(default) if isinstance(default, tuple) else default)
    return f"{about.help} (default: {shown})".replace("%", "%%")


def _replacing(other: str) -> type[argparse.Action]:
    class Replace(argparse.Action):
        """Set this flag and forget the other: arguments added to a recipe replace its own."""

        def __call__(
            self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
        ) -> None:
            setattr(namespace, self.dest, values)
            setattr(namespace, other, None)

    return Replace


def from_flat(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a dataclass from flag names and values; what is missing takes its default.

    Names that it does not have are passed over: an old config.json may hold some.

    Raises:
        UserError: a value lies outside its flag's range; names the flag.
    """
    made: dict[str, Any] = {}
    for member, inner, (_, several) in _members(cls):
        if inner is not None:
            made[member.name] = from_flat(inner, values)
            continue
        if _name(member) not in values:
            continue
        value = values[_name(member)]
        if several:
            value = member.default if value is None else tuple(value)
        _check(member, value)
        made[member.name] = value
    return cls(**made)


def _check(member: Field[Any], value: Any) -> None:
    about = _about(member)
    for one in value if isinstance(value, tuple) else (value,):
        checks = (*about.checks, _OF_FLOAT32) if isinstance(one, float) else about.checks
        for check in checks:
            if one is not None and not check.holds(one):
                raise UserError(f"--{_name(member)} must {check.text}, got {one}")


def flat(config: Any) -> dict[str, Any]:
    """The flags of a dataclass and their values, as JSON keeps them (tuples as lists)."""
    values: dict[str, Any] = {}
    for member, inner, _ in _members(type(config)):
        value = getattr(config, member.name)
        if inner is not None:
            values |= flat(value)
        elif _about(member).record:
            values[_name(member)] = list(value) if isinstance(value, tuple) else value
    return values


def defaults_of(cls: type[Any]) -> dict[str, Any]:
    """Give the values of a dataclass's flags where none is given, as `flat` does."""
    return flat(from_flat(cls, {}))


def parse(cls: type[T], argv: Sequence[str], program: str, about: str | None = None) -> T:
    """Parse a command line into a dataclass; ranges are checked, rules across fields are not.

    Raises:
        UserError: naming the flag and what would be right.
    """
    return from_flat(cls, given_flags(cls, argv, program, about))


def given_flags(
    cls: type, argv: Sequence[str], program: str, about: str | None = None
) -> dict[str, Any]:
    """The flags that a command line gives, and their values; --config_file's come before its own.

    Raises:
        UserError: naming the flag or the file and what would be right.
    """
    parser = build_parser(cls, program, about)
    from_files = [word for file in _config_files(argv) for word in _file_argv(cls, file, parser)]
    values = vars(parser.parse_args([*from_files, *argv]))
    values.pop("config_file", None)
    _complete(cls, values)
    return values


def build_parser(cls: type, program: str, about: str | None = None) -> Parser:
    """The parser of a dataclass's flags, and of --config_file where all of them have names."""
    parser = Parser(program, about)
    if not any(inner is None and _about(member).positional for member, inner, _ in _members(cls)):
        parser.add_argument(
            "--config_file",
            metavar="FILE",
            default=argparse.SUPPRESS,
            help="a YAML or JSON file with values of these flags by name, in their sections or "
            "not; of several the later ones win, and over all of them flags given beside them",
        )
    add_flags(parser, cls)
    return parser


def _config_files(argv: Sequence[str]) -> list[Path]:
    first = Parser("", None, add_help=False)
    first.add_argument("--config_file", action="append", default=[])
    return [Path(os.path.expanduser(f)) for f in first.parse_known_args(argv)[0].config_file]


def _complete(cls: type, values: dict[str, Any]) -> None:
    """Expand home directories and files of lines; ask for what must be given."""
    missing = []
    for member, inner, _ in _members(cls):
        if inner is not None:
            _complete(inner, values)
            continue
        about, name = _about(member), _name(member)
        value = values.get(name)
        if about.required and value is None and not about.positional:
            missing.append(f"--{name}")
        if about.expand and value is not None:
            # As of a shell's variable that is not set; it would name where one is.
            if value == "" and not about.empty:
                raise UserError(f"--{name} is empty: give a path, or leave it out")
            # An unknown user's ~ stays as it is, and is answered as a path that is not there.
            values[name] = type(value)(os.path.expanduser(value))
        if about.lines and value and len(value) == 1 and value[0].endswith(".txt"):
            values[name] = _read_lines(Path(os.path.expanduser(value[0])), name)
    if missing:
        raise UserError(f"the following arguments are required: {', '.join(missing)} (see --help)")


def _read_lines(path: Path, name: str) -> list[str]:
    if not path.is_file():
        raise UserError(f"--{name}: there is no file {path}")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise UserError(f"--{name}: {path} holds no prompt")
    return lines


def _file_argv(cls: type, path: Path, parser: Parser) -> list[str]:
    """The command line that a configuration file stands for."""
    values = read_mapping(path, "--config_file")
    names, sections = flag_names(cls), set(flag_names(cls).values()) - {""}
    switches = {action.dest for action in parser._actions if action.nargs == 0}
    argv: list[str] = []
    for key, value in values.items():
        inner = {key: value}
        if key in sections and key not in names:
            if not isinstance(value, dict):
                raise UserError(
                    f"--config_file {path}: {key} is a section; give its flags below it"
                )
            inner = value
        for name, one in inner.items():
            where = key if inner is value else names.get(name)
            if name not in names or names[name] != where:
                raise UserError(f"--config_file {path}: there is no flag {name} here (see --help)")
            if isinstance(one, dict):
                raise UserError(f"--config_file {path}: {name} must be a value, not a section")
            if name in switches and not isinstance(one, bool):
                raise UserError(f"--config_file {path}: {name} must be true or false, got {one}")
            argv += [f"--no-{name}"] if one is False else as_argv({name: one})
    try:
        from_flat(cls, vars(parser.parse_args(argv)))
    except UserError as error:
        raise UserError(f"--config_file {path}: {error}") from None
    return argv


def read_mapping(path: Path, flag_name: str) -> dict[str, Any]:
    """Read a YAML or JSON file that holds one mapping.

    Raises:
        UserError: missing, broken, of another kind, or with a key given twice; names `flag_name`.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that is given twice."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
            twice = [key for key in keys if keys.count(key) > 1]
            if twice:
                raise yaml.YAMLError(f"{twice[0]} is given twice")
            return super().construct_mapping(node, deep)

    if not path.is_file():
        raise UserError(f"{flag_name}: there is no file {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{flag_name}: cannot read {path}: {first_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{flag_name}: {path} must hold names and values, one a line")
    return values
