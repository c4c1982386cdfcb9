# SPDX-License-Identifier: Apache-2.0
"""The command posthoc: verbs, and the one place where errors become exit codes."""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from dirtymap import errors
from posthoc import exits, interrupts, report
from posthoc.commands import (
    attach,
    diff,
    digest,
    estimate,
    install,
    merge,
    mount,
    show_map,
    status,
    umount,
    verify,
    wait,
)

_VERBS = (
    mount,
    umount,
    status,
    wait,
    diff,
    show_map,
    merge,
    verify,
    install,
    digest,
    estimate,
    attach,
)

_EPILOG = """\
Images: PATH is raw (a file or block device); qcow2:PATH, vmdk:, vdi:, vhdx:, vpc:, luks:;
nbd://HOST/EXPORT, nbds://, nbd+unix:///EXPORT?socket=PATH. A format is named, never guessed.

Exit codes: 0 done; 1 diff and verify: they differ; 2 a mistake or the environment;
3 an I/O error, with a result that is still valid; 4 a bug. Ended by Ctrl-C: 130, by SIGTERM: 143,
by SIGHUP: 129; nothing half-done is left.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are."""

    def error(self, message: str) -> NoReturn:
        """Tell what is wrong with the command line, and exit."""
        self.exit(exits.MISTAKE, f"posthoc: {message} (see {self.prog} --help)\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command."""
    made = _Parser(
        prog="posthoc",
        description="Find after the fact which parts of a VM's disk have changed since a backup.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = importlib.metadata.version("posthoc")
    made.add_argument("--version", action="version", version=f"posthoc {version}")
    verbs = made.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb in _VERBS:
        verb.register(verbs)
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
        parsed = parser().parse_args(arguments)
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
