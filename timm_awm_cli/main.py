"""Finds the command and runs it.

The file of a command has HELP, a line; add_arguments(parser); and run(args), which imports what it needs. It raises
OSError, OverflowError, RuntimeError or ValueError with a message for the user. If it has TAKES_REST, what the parser
does not know is passed on as args.rest.
"""
import argparse
import importlib
import os
import signal
import sys
import threading
from importlib.metadata import PackageNotFoundError, version
from typing import Any, List, NoReturn, Optional

__all__ = ['main']

COMMANDS = dict(
    demo='demo', models='models', recipes='recipes', train='train', validate='script', benchmark='script',
    compare='compare', analyze='analyze', explore='explore', export='export', push='push')


def main(args: Optional[List[str]] = None) -> int:
    """Run the command; returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):  # a console that is not UTF-8 must not end a run of hours
            stream.reconfigure(errors='backslashreplace')
    parser, modules = _parser()
    parsed, rest = parser.parse_known_args(args)
    module = modules[parsed.command]
    if getattr(module, 'TAKES_REST', False):
        parsed.rest = rest[1:] if rest[:1] == ['--'] else rest
    elif rest:
        parser.error(f'unrecognized arguments: {" ".join(rest)}')
    previous_handler = signal.signal(signal.SIGTERM, _terminate)  # so that a command cleans up behind itself
    previous_hook, sys.unraisablehook = sys.unraisablehook, _send_again
    try:
        module.run(parsed)
    except KeyboardInterrupt:
        print('Interrupted.', file=sys.stderr)
        return 130
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        print(f'timm-awm: {error}', file=sys.stderr)
        return 1
    finally:
        sys.unraisablehook = previous_hook
        signal.signal(signal.SIGTERM, previous_handler)
    return 0


def _parser() -> Any:
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
        takes_rest = getattr(module, 'TAKES_REST', False)
        module.add_arguments(commands.add_parser(
            name, help=module.HELP.format(name=name), allow_abbrev=not takes_rest))
    return parser, modules


def _terminate(*_: Any) -> NoReturn:
    sys.exit(143)


def _send_again(ignored: Any) -> None:
    """Sends a signal again if its exception was ignored, as it is in a destructor or a weak reference's callback."""
    numbers = {SystemExit: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}
    if ignored.exc_type in numbers:
        threading.Timer(0.1, os.kill, [os.getpid(), numbers[ignored.exc_type]]).start()  # when the destructor is left
    else:
        sys.__unraisablehook__(ignored)


def positive_int(text: str) -> int:
    """For the type of an argument."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'must be at least 1, got {value}')
    return value
