# SPDX-License-Identifier: Apache-2.0
"""The command posthoc: verbs, and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from dirtymap import errors
from posthoc import background, exits, interrupts, report

# Verbs and their modules in posthoc.commands, in the order of --help.
_VERBS = {
    "mount": "mount",
    "umount": "umount",
    "status": "status",
    "wait": "wait",
    "diff": "diff",
    "map": "show_map",
    "merge": "merge",
    "verify": "verify",
    "install": "install",
    "digest": "digest",
    "estimate": "estimate",
    "attach": "attach",
}

_EPILOG = """\
Images: PATH is raw (a file or block device); qcow2:PATH, vmdk:, vdi:, vhdx:, vpc:, luks:;
nbd://HOST/EXPORT, nbds://, nbd+unix:///EXPORT?socket=PATH. A format is named, never guessed.

Exit codes: 0 done; 1 diff and verify: they differ; 2 a mistake or the environment;
3 an I/O error, with a result that is still valid; 4 a bug. Ended by Ctrl-C: 130, by SIGTERM: 143,
by SIGHUP: 129; nothing half-done is left.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def __init__(self, **options: Any) -> None:
        # An abbreviation that works today is another option's tomorrow.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with the command line, and exit."""
        self.exit(exits.MISTAKE, f"posthoc: {message} (see {self.prog} --help)\n")


class _Version(argparse.Action):
    """--version, which looks it up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        """Print it, and exit."""
        from importlib import metadata  # 30 ms, for this option alone

        print(f"posthoc {metadata.version('posthoc')}")
        parser.exit(exits.DONE)


def parser(verb: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the whole command, or of one verb alone.

    Loading the modules of all verbs takes 0.4 s, those of `umount` 0.03 s.
    """
    made = _Parser(
        prog="posthoc",
        description="Find after the fact which parts of a VM's disk have changed since a backup.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    verbs = made.add_subparsers(title="verbs", metavar="VERB", required=True)
    for module in [_VERBS[verb]] if verb in _VERBS else _VERBS.values():
        importlib.import_module(f"posthoc.commands.{module}").register(verbs)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    with interrupts.as_ctrl_c() as arrived:
        code = _run(arguments)
    return exits.SIGNALLED + arrived[0] if arrived else code


def _run(arguments: Sequence[str] | None) -> int:
    logging.basicConfig(format="posthoc: %(message)s", level=logging.INFO)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A file's name may hold what this locale cannot write.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if background.is_meant(words):
            # The session's process parses them, and loads what they need: twice would take 0.5 s more.
            return background.start(words)
        parsed = parser(next(iter(words), None)).parse_args(words)
        code: int = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read our output has enough (`posthoc map --extents | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exits.DONE
    except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:  # noqa: BLE001 (told there)
        return report_error(error)


def report_error(error: BaseException) -> int:
    """Tell of `error` on stderr, one line where it is no bug, and return the exit code for it."""
    leaves = list(_leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
        return exits.INTERRUPTED
    if not all(isinstance(leaf, errors.PosthocError) for leaf in leaves):
        traceback.print_exception(error)
        return exits.BUG
    for leaf in leaves:
        print(f"posthoc: {report.one_line(' '.join(str(leaf).split()))}", file=sys.stderr)
    mistake = any(isinstance(leaf, errors.UserError) for leaf in leaves)
    return exits.MISTAKE if mistake else exits.READ_ERROR


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """Yield what nurseries have wrapped: the errors themselves."""
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error
