"""Finds the command and runs it.

The file of a command has HELP, a line; add_arguments(parser); and run(args), which imports what it needs. It raises
ImportError, OSError, OverflowError, RuntimeError or ValueError with a message for the user. If it has TAKES_REST, what
the parser does not know is passed on as args.rest.
"""
import argparse
import importlib
import os
import signal
import sys
import textwrap
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import List, Optional

COMMANDS = dict(
    demo='demo', models='models', recipes='recipes', train='train', validate='validate', benchmark='validate',
    compare='compare', analyze='analyze', explore='explore', export='export', push='push')
EXTRAS = dict(demo='demo', analyze='analysis', explore='explore')


def main(args: Optional[List[str]] = None) -> int:
    """Run the command; returns its exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a command cleans up behind itself
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a console that is not UTF-8 must not end a run of hours
            stream.reconfigure(errors='backslashreplace')
    # read with torch: threads that wait by spinning make networks several times slower beside other work
    os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')
    parser = argparse.ArgumentParser(
        prog='timm-awm', description='Active weighted mapping (AWM) for timm.', epilog='Example: timm-awm demo')
    try:
        installed = version('timm-awm')
    except PackageNotFoundError:  # a copy of the source
        installed = 'not installed'
    parser.add_argument('--version', action='version', version=f'timm-awm {installed}')
    commands = parser.add_subparsers(metavar='command', dest='command', required=True)
    modules = {name: importlib.import_module(f'.{file}', __package__) for name, file in COMMANDS.items()}
    for name, module in modules.items():
        command = commands.add_parser(
            name, help=module.HELP.format(name=name), allow_abbrev=not hasattr(module, 'TAKES_REST'),
            formatter_class=argparse.RawDescriptionHelpFormatter)  # keeps examples in lines that can be copied
        module.add_arguments(command)
        command.description = textwrap.fill(command.description or '', 79)
    parsed, rest = parser.parse_known_args(args)
    module = modules[parsed.command]
    if hasattr(module, 'TAKES_REST'):
        parsed.rest = rest[1:] if rest[:1] == ['--'] else rest
    elif rest:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    try:
        module.run(parsed)
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        return 130
    except (ImportError, OSError, OverflowError, RuntimeError, ValueError) as error:
        print(f'timm-awm: {error}', file=sys.stderr)
        extra = 'data' if getattr(error, 'name', None) == 'datasets' else EXTRAS.get(parsed.command)
        if extra and isinstance(error, ModuleNotFoundError):
            print(f'The extra brings it: pip install ".[{extra}]", as the README says.', file=sys.stderr)
        return 1
    return 0


def positive_int(text: str) -> int:
    """Argument type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value


def new_path(text: str) -> Path:
    """Argument type: the path of an output, which must not exist yet."""
    path = Path(text)
    if path.exists():
        raise argparse.ArgumentTypeError(f'{path} exists already: remove it, or choose another path')
    return path
