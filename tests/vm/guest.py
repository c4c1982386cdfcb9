# SPDX-License-Identifier: Apache-2.0
"""Boots a real guest on one disk and runs a shell script in it.

QEMU's translator unless told otherwise (about 4 s to the script): it is the same on every machine.
The disk is /dev/vda, opened without the host's cache, so that every write reaches the file at once.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence

from tests import wait
from tests.vm import initramfs, packages

QEMU = os.environ.get("POSTHOC_QEMU_SYSTEM", "qemu-system-x86_64")
_ENDED = re.compile(r"^guest: script ended with (\d+)\r?$", re.MULTILINE)

# A translated guest takes 6 s, and was seen to take 80 on two cores with 19 busy programs.
DEADLINE = 400.0


class GuestFailedError(AssertionError):
    """The guest did not run its script to a good end; the text is its console."""


class Guest:
    """A running guest; made by boot()."""

    def __init__(self, process: subprocess.Popen[bytes], console: pathlib.Path) -> None:
        self._process = process
        self._console = console

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        """What the guest has printed so far."""
        return self._console.read_text(errors="replace").replace("\r\n", "\n")

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def until(self, line: str, deadline: float = DEADLINE) -> None:
        """Wait until the guest has printed `line`."""

        def printed() -> bool:
            if line in self.log:
                return True
            if not self.running:
                raise GuestFailedError(f"the guest ended before it printed {line!r}:\n{self.log}")
            return False

        wait.until(printed, f"the guest prints {line!r}; it printed:\n{self.log}", deadline)

    def wait(self, deadline: float = DEADLINE) -> str:
        """Wait for the power-off and return the console; GuestFailedError if the script failed."""
        try:
            status = self._process.wait(deadline)
        except subprocess.TimeoutExpired:
            raise GuestFailedError(f"no power-off within {deadline:.0f} s:\n{self.log}") from None
        ended = _ENDED.search(self.log)
        if status != 0 or ended is None or ended[1] != "0":
            raise GuestFailedError(f"QEMU exited with {status}; console:\n{self.log}")
        return self.log


@contextlib.contextmanager
def boot(
    disk: str | os.PathLike[str] | None,
    script: str,
    *,
    programs: Sequence[str] = (),
    disk_options: dict[str, object] | None = None,
    accelerator: str = "tcg",
    arguments: Sequence[str] = (),
) -> Iterator[Guest]:
    """Boot a guest on a raw disk and run `script` (busybox's sh) as its only program.

    `programs` of this machine are copied into it: "mke2fs" is called as /sbin/mke2fs. `disk_options` are added to the
    blockdev's file node, instead of {"cache": {"direct": True}}; `arguments` are more of QEMU's. The
    guest is killed if it still runs when the block ends.
    """
    parts = packages.fetch()
    with tempfile.TemporaryDirectory(prefix="posthoc-guest-") as scratch:
        folder = pathlib.Path(scratch)
        initrd = folder / "initrd"
        initrd.write_bytes(_base(parts) + initramfs.script(script, tuple(programs)))
        console = folder / "console"
        console.touch()
        command = [
            *(QEMU, "-accel", accelerator, "-machine", "q35", "-cpu", "max"),
            *("-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-serial", f"file:{console}", "-kernel", str(parts.kernel), "-initrd", str(initrd)),
            *("-append", "console=ttyS0 quiet panic=-1 mitigations=off"),
            *_disk(disk, disk_options),
            *arguments,
        ]
        errors = folder / "errors"
        with errors.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            yield Guest(process, console)
        except GuestFailedError as error:
            raise GuestFailedError(f"{error}\nQEMU: {errors.read_text()}") from None
        finally:
            process.kill()
            process.wait()


def _disk(path: str | os.PathLike[str] | None, options: dict[str, object] | None) -> list[str]:
    """Return the options of a virtio disk that passes discards on."""
    if path is None:
        return []
    cache = {"cache": {"direct": True, "no-flush": False}} if options is None else options
    file = {"driver": "file", "filename": os.fspath(path), "discard": "unmap", **cache}
    node = {"driver": "raw", "node-name": "disk0", "discard": "unmap", "file": file}
    return ["-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=disk0"]


@functools.cache
def _base(parts: packages.Parts) -> bytes:
    return initramfs.base(parts.busybox, parts.modules)


@functools.cache
def best_accelerator() -> str:
    """Return "kvm" if a guest starts and ends under it here, else "tcg".

    /dev/kvm may exist and not work, in several ways: a guest that powers off is the proof. The
    answer is kept until the machine boots again.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    boot_id = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    note = packages.HOME / "accelerator"
    if note.exists() and note.read_text().split()[:1] == [boot_id]:
        return note.read_text().split()[1]
    try:
        with boot(None, "true", accelerator="kvm") as guest:
            guest.wait(15)
        answer = "kvm"
    except GuestFailedError:
        answer = "tcg"
    note.write_text(f"{boot_id} {answer}\n")
    return answer
