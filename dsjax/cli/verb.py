"""How a command reads its arguments and answers mistakes: one line on stderr and exit code 2."""

import errno
import math
import operator
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable
from typing import Any

import click

from dsjax.config import ConfigError, expected, field_names, nearest, show
from dsjax.plan.count import human_number

SHORT = {
    "overlap": "compute.overlap",
    "precision": "compute.precision",
    "on_error": "data.on_error",
}  # options that need no section
OPTION = re.compile(r"--[A-Za-z][\w.-]*(=.*)?", re.DOTALL)  # "-- a comment" is a value, "--steps" is not


class Number(click.ParamType):
    """A number in a range, refused in the words that a configuration's fields use."""

    name = "number"

    def __init__(self, kind: type, expected: str, valid: Callable[[Any], bool]):
        self.kind, self.expected, self.valid = kind, expected, valid

    def convert(self, value, param, ctx):
        try:
            number = self.kind(value)
        except ValueError:
            number = None
        if number is None or not self.valid(number):
            raise ConfigError(f"{param.opts[0]}={show(value)}: expected {self.expected}")
        return number


POSITIVE = Number(int, "a whole number greater than 0", lambda n: n > 0)
NATURAL = Number(int, "a whole number at least 0", lambda n: 0 <= n < 2**32)
DEVICES = click.option("--devices", type=POSITIVE, metavar="N", help="Compute on N fake devices of the CPU.")
PHASE = click.option("--phase", metavar="NAME", help="Phase of the preset: pretrain, 32k, 128k.")
TEMPERATURE = Number(float, "a number at least 0 (0 = the likeliest token)", lambda t: 0 <= t < float("inf"))
PRICE = Number(float, "a price greater than 0", lambda p: 0 < p < float("inf"))
TOKENS = Number(human_number, "a number of tokens, as in 14.8T or 300B", lambda n: 0 < n < float("inf"))
PROBABILITY = Number(float, "a number greater than 0 and at most 1", lambda p: 0 < p <= 1)


_BOUNDS = {"gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le}


def fields_of(kind: type, *without: str) -> Callable:
    """Options for the fields of a configuration, with its defaults, ranges and descriptions."""

    def decorate(command):
        for name in reversed([name for name in kind.__dataclass_fields__ if name not in without]):
            field, hint = kind.__pydantic_fields__[name], typing.get_type_hints(kind)[name]
            words = f"{field.description[0].upper()}{field.description[1:]}."
            if hint is bool:
                more = {"is_flag": True}
            else:
                more = {"type": _number_of(kind, name), "show_default": field.default is not None}
            command = click.option(_option(name), name, default=field.default, help=words, **more)(command)
        return command

    return decorate


def _number_of(kind: type, name: str) -> Number:
    bounds = [(compare, getattr(bound, key)) for bound in kind.__pydantic_fields__[name].metadata
              for key, compare in _BOUNDS.items() if hasattr(bound, key)]  # fmt: skip
    words = expected(name, kind).removesuffix(", or none")
    whole = words.startswith("a whole")
    return Number(
        int if whole else float,
        words,
        lambda n: (whole or math.isfinite(n)) and all(compare(n, limit) for compare, limit in bounds),
    )


class Verb(click.Command):
    """A command with options of its own and, if `fields`, every configuration field as one more.

    The fields arrive as the argument `changes`, dotted name -> text. Every option may be given once, unless it
    is `multiple`, before or after the arguments.
    """

    def __init__(self, *args, fields: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.fields = field_names() if fields else []

    def parse_args(self, ctx, args):
        if ctx.resilient_parsing:  # shell completion
            return super().parse_args(ctx, args)
        own = {name: p for p in self.get_params(ctx) if isinstance(p, click.Option) for name in p.opts}
        rest, given, queue = [], {}, list(args)
        while queue:
            arg = queue.pop(0)
            if arg == "--":
                rest += [arg, *queue]
                break
            name, equals, value = arg.partition("=")
            if len(arg) < 2 or arg[0] != "-":
                rest.append(arg)
                continue
            if name in own and own[name].is_flag:
                if equals:
                    raise ConfigError(f"{name}={show(value)}: takes no value; expected {name} alone")
                rest.append(arg)
                continue
            field = name[2:].replace("-", "_")
            field = SHORT.get(field, field)
            if name not in own and not self._is_field(name, field):
                raise ConfigError(_unknown_option(arg, [*own, *map(_option, self.fields)]))
            optional = getattr(own.get(name), "flag_value", None)  # of an option whose value may be left out
            if not equals and isinstance(optional, str) and (not queue or queue[0].startswith("-")):
                value, equals = optional, "="
            if not equals:
                if not queue or OPTION.fullmatch(queue[0]):
                    wanted = expected(field) if name not in own else _expected_by(own[name])
                    raise ConfigError(f"{name}: missing value; expected {wanted}")
                value = queue.pop(0)
            key = name if name in own else field
            if key in given and not getattr(own.get(name), "multiple", False):
                raise ConfigError(f"{name}={show(value)}: given twice, first as {show(given[key])}")
            given[key] = value
            if name in own:
                rest.append(f"{name}={value}")
        super().parse_args(ctx, rest)
        if self.fields:
            ctx.params["changes"] = {key: value for key, value in given.items() if key not in own}

    def _is_field(self, name: str, field: str) -> bool:
        """Whether it is a field, or a whole section of them, which `override` answers."""
        return name.startswith("--") and any(known == field or known.startswith(f"{field}.") for known in self.fields)


class Dsjax(click.Group):
    """The commands, with errors of one line."""

    command_class = Verb

    def parse_args(self, ctx, args):
        own = [name for p in self.get_params(ctx) for name in p.opts]
        if args and args[0].startswith("-") and args[0] not in own and not ctx.resilient_parsing:
            raise ConfigError(_unknown_option(args[0], own))
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx, args):
        if args[0] not in self.commands and not ctx.resilient_parsing:
            near = nearest(args[0], self.commands)[0]
            raise ConfigError(f"{show(args[0])}: no such command; the nearest is {near}")
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx):
        return list(self.commands)  # in the order of a first visit, not of the alphabet

    def main(self, *args, **kwargs):
        try:
            kwargs["standalone_mode"] = False
            code = super().main(*args, **kwargs)
            sys.stdout.flush()
        except BrokenPipeError:  # `dsjax presets | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
        except ConfigError as error:
            code = _fail(str(error))
        except click.exceptions.NoArgsIsHelpError as error:
            code = 2
            click.echo(error.format_message())
        except click.MissingParameter as error:
            code = _fail(f"{error.param.human_readable_name}: missing; {_see_help(error)}")
        except click.ClickException as error:
            message = error.format_message().rstrip(".")
            code = _fail(f"{message[:1].lower()}{message[1:]}; {_see_help(error)}")
        except click.Abort:  # Ctrl-C
            code = 130
        except (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError) as error:
            code = _fail(f"{error.filename}: {error.strerror}")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise
            code = _fail(f"{error.filename or 'disk'}: {error.strerror}")
        code = code if isinstance(code, int) else 0
        feed = sys.modules.get("dsjax.train.feed")
        if feed is not None and feed.left_behind():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        sys.exit(code)


def _unknown_option(arg: str, known: Iterable[str]) -> str:
    known = list(known)
    option = arg.partition("=")[0].replace("_", "-")
    if option.startswith("--"):
        # Without the dashes, so that --peak-lr is seen to be the last part of --optimizer.peak-lr.
        near = [f"--{name}" for name in nearest(option[2:], [name[2:] for name in known if name.startswith("--")])]
    else:
        near = nearest(option, known)
    return f"{show(arg)}: no such option; the nearest is {' or '.join(near)}"


def _expected_by(option: click.Option) -> str:
    return getattr(option.type, "expected", f"a {(option.metavar or 'text').lower()}")


def _option(field: str) -> str:
    return f"--{field.replace('_', '-')}"


def _see_help(error: click.ClickException) -> str:
    path = error.ctx.command_path if getattr(error, "ctx", None) else "dsjax"
    return f"see `{path} --help`"


def _fail(message: str) -> int:
    click.echo("dsjax: " + " ".join(message.split("\n")), err=True)
    return 2
