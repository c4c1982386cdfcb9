# SPDX-License-Identifier: Apache-2.0
"""A libvirtd of the tests' own, in session mode, and a domain on it.

Session mode needs no systemd, no D-Bus and no users of libvirt's. Root has no session of libvirt's, so that
under root it runs as nobody: its QEMU is then another user than posthoc, as with a system's libvirt.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

from tests import qemu, wait
from tests.posthoc.qemu import running

NOBODY = 65534

_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64' machine='q35'>hvm</type></os>
  <devices>
    {disks}
    <memballoon model='none'/>
  </devices>
</domain>
"""
_DISK = """
<disk type='file' device='disk'>
  <driver name='qemu' type='{format}' discard='unmap'/>
  <source file='{path}'/>
  <target dev='{target}' bus='virtio'/>
</disk>
"""


@dataclasses.dataclass(frozen=True)
class Libvirt:
    """A running libvirtd; `folder` may be read by its QEMUs."""

    folder: pathlib.Path

    @property
    def uri(self) -> str:
        return f"qemu:///session?socket={self.folder}/run/libvirt/libvirt-sock"

    def virsh(self, *words: str | pathlib.Path) -> str:
        """Run virsh to its good end."""
        return qemu.run("virsh", "--connect", self.uri, "--quiet", *words)

    def own(self, path: pathlib.Path) -> None:
        """Give a file to the user that QEMU runs as."""
        if os.geteuid() == 0:
            os.chown(path, NOBODY, NOBODY)


@dataclasses.dataclass(frozen=True)
class Domain:
    """A paused domain without a system on its disks: what is under test is its block layer."""

    libvirt: Libvirt
    name: str

    def virsh(self, verb: str, *words: str | pathlib.Path) -> str:
        return self.libvirt.virsh(verb, self.name, *words)

    def qmp(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        message = json.dumps({"execute": command, "arguments": arguments or {}})
        reply = json.loads(self.virsh("qemu-monitor-command", message))
        assert "return" in reply, reply
        return reply["return"]

    def write(self, number: int, start: int, length: int, pattern: int) -> None:
        """Write to disk `number` as the guest would."""
        device = f"/machine/peripheral/virtio-disk{number}/virtio-backend"
        text = f'qemu-io -d {device} "write -q -P {pattern} {start} {length}"'
        said = self.virsh("qemu-monitor-command", "--hmp", text)
        assert said.strip() == "", said

    @property
    def pid(self) -> int:
        return int((self.libvirt.folder / f"run/libvirt/qemu/run/{self.name}.pid").read_text())


@contextlib.contextmanager
def serving() -> Iterator[Libvirt]:
    """Run libvirtd."""
    with running.folder() as folder:
        folder.chmod(0o711)
        libvirt = Libvirt(folder)
        for name in ("home", "run"):
            (folder / name).mkdir(mode=0o700)
            libvirt.own(folder / name)
        daemon = shutil.which("libvirtd", path=os.environ.get("PATH", "") + ":/usr/sbin")
        assert daemon is not None, "libvirtd is missing: scripts/setup installs libvirt-daemon"
        command = [daemon]
        if os.geteuid() == 0:
            user = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            command = ["setpriv", *user, *command]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("XDG_")},
            "HOME": str(folder / "home"),
            "XDG_RUNTIME_DIR": str(folder / "run"),
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd="/"
            )

        def answers() -> bool:
            assert process.poll() is None, (folder / "log").read_text()
            words = ["virsh", "--connect", libvirt.uri, "version"]
            return subprocess.run(words, capture_output=True).returncode == 0

        try:
            wait.until(answers, "libvirtd answers")
            yield libvirt
        finally:
            process.terminate()
            try:
                process.wait(wait.DEADLINE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def domain(libvirt: Libvirt, name: str, *disks: running.Disk) -> Iterator[Domain]:
    """Run a domain whose disks are vda, vdb and so on."""
    described = []
    for disk, target in zip(disks, ("vda", "vdb", "vdc"), strict=False):
        libvirt.own(disk.path)
        described.append(_DISK.format(format=disk.format, path=disk.path, target=target))
    path = libvirt.folder / f"{name}.xml"
    path.write_text(_DOMAIN.format(name=name, disks="".join(described)))
    libvirt.virsh("create", "--paused", path)
    made = Domain(libvirt, name)
    try:
        yield made
    finally:
        # It may have been ended by the test.
        words = ["virsh", "--connect", libvirt.uri, "destroy", name]
        subprocess.run(words, capture_output=True, check=False)
