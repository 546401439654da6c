"""The command line ``python -m memnet <command>``; bundles run by ``python -m monai.bundle``."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from memnet import __version__
from memnet.accounting import plan_command
from memnet.benchmarks import (
    comparison,
    depth,
    layouts,
    scaling,
    superresolution,
    superresolution_trials,
    training_memory,
    unrolled,
)
from memnet.benchmarks.peers import command as peers
from memnet.bundle import hide_warnings_of_monai, input_error
from memnet.datasets import diffusion_blocks, diffusion_copies
from memnet.workflow import packing, reconstruction_scoring, scoring, tumor_scoring

__all__ = ["main"]

# each adds its parser to the subparsers and sets the parser's default `function`
COMMANDS: tuple[Callable[[Any], None], ...] = (
    scoring.add_parser,
    tumor_scoring.add_parser,
    reconstruction_scoring.add_parser,
    plan_command.add_parser,
    packing.add_parser,
    training_memory.add_parser,
    layouts.add_parser,
    comparison.add_parser,
    depth.add_parser,
    scaling.add_parser,
    unrolled.add_parser,
    peers.add_parser,
    superresolution.add_parser,
    superresolution_trials.add_parser,
    diffusion_blocks.add_parser,
    diffusion_copies.add_parser,
)


class _Command(argparse.ArgumentParser):
    """A command whose ``--help`` says what each option is where it is not given."""

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if "default" not in (action.help or "") and action.default not in (None, False, [], argparse.SUPPRESS):
            values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
            every = action.nargs in ("+", "*") and list(values) == action.choices
            told = "all" if every else " ".join(map(str, values))
            action.help = f"{action.help or ''} (default: {told})".lstrip()
        return action


class _Commands(argparse._SubParsersAction):
    """Commands whose ``--help`` begins with what ``python -m memnet --help`` says of them, if they have no more to say."""

    def add_parser(self, name: str, **options: Any) -> Any:
        sentence = f"{options['help'][0].upper()}{options['help'][1:]}."
        return super().add_parser(name, **{"description": sentence} | options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: the words after ``python -m memnet``; those of the process by default.

    Returns:
        The exit code: 0, or 1 after an error in the input, which is printed in one line.
    """
    parser = argparse.ArgumentParser(prog="python -m memnet", description="Commands of memnet.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(
        title="commands", metavar="command", required=True, action=_Commands, parser_class=_Command
    )
    for add_parser in COMMANDS:
        add_parser(commands)
    chosen = parser.parse_args(arguments)
    hide_warnings_of_monai()
    try:
        chosen.function(chosen)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # of a reader that has read enough, such as head; Python would complain once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        found = input_error(error)
        if found is None:
            raise
        print(f"error: {' '.join(str(found).split())}", file=sys.stderr)
        return 1
    return 0
