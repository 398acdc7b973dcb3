"""The parser's commands, and the words that several take."""

import argparse
from collections.abc import Callable

Command = Callable[[argparse.Namespace], int | None]


class Commands:
    """The commands of the parser; each gets a function, and a line of help."""

    def __init__(self, subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        self._subparsers = subparsers

    def add(self, name: str, run: Command, text: str) -> argparse.ArgumentParser:
        description = f"{text[0].upper()}{text[1:]}."
        parser = self._subparsers.add_parser(name, help=text, description=description)
        parser.set_defaults(command=run)
        return parser

    def of_recipe(
        self, name: str, run: Command, text: str, *, optional: bool = False
    ) -> argparse.ArgumentParser:
        """A command that takes RECIPE KEY=VALUE..."""
        parser = self.add(name, run, text)
        parser.add_argument(
            "recipe",
            metavar="RECIPE",
            nargs="?" if optional else None,
            help="file, name or run directory",
        )
        parser.add_argument(
            "overrides",
            metavar="KEY=VALUE",
            nargs="*",
            help="set a key, such as rollout.num_prompts=8",
        )
        return parser


def positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return number


def natural(text: str) -> int:
    """A number from 0, as an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)
