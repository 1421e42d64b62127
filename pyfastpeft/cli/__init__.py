"""The command line: one module for each group of commands."""

import argparse
import sys

import pyfastpeft

from . import adapters, doctor, parameters


def main(arguments: list[str] | None = None) -> int:
    """Run the command line on `arguments` (default: sys.argv) and return its exit code.

    0: done; 1: `doctor` found a wrong result; 2: the arguments, or the files that they name, do not fit.
    """
    parser = argparse.ArgumentParser(prog="pyfastpeft", description=pyfastpeft.__doc__)
    parser.add_argument("--version", action="version", version=f"pyfastpeft {pyfastpeft.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for module in (doctor, adapters, parameters):
        module.add_to(commands)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except (ImportError, NotImplementedError, OSError, TypeError, ValueError) as why:
        print(f"pyfastpeft: {why}", file=sys.stderr)
        return 2
