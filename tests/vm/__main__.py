# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.vm fetch`, `python -m tests.vm boot DISK SCRIPT`: the guest for scripts."""

import pathlib
import signal
import sys

from tests.vm import guest, packages


def main(arguments: list[str]) -> int:
    """Run one of the two and return an exit status."""
    match arguments:
        case ["fetch"]:
            packages.fetch()
        case ["boot", disk, script]:
            # Ends the block below in order, and with it QEMU.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            try:
                text = pathlib.Path(script).read_text()
                with guest.boot(disk, text, accelerator=guest.best_accelerator()) as running:
                    print(running.wait(), end="")
            except guest.GuestFailedError as error:
                print(error, file=sys.stderr)
                return 1
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
