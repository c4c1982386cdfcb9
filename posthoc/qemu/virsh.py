# SPDX-License-Identifier: Apache-2.0
"""A libvirt domain's QEMU, through virsh.

libvirt keeps the only monitor to itself and passes commands on (`virsh qemu-monitor-command`); events do
not come through. What is left to libvirt is what it must know of: a checkpoint's registration.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import trio

from dirtymap import errors
from posthoc.qemu import qmp

# Between two looks whether the domain still runs.
_LOOK = 2.0
# libvirt's driver gives each domain a folder; its secret key lies in it and is on QEMU's command line.
_DOMAIN_FOLDER = re.compile(r"""[=:]"?(/[^",]+)/master-key\.aes""")

# virsh's words for a domain that libvirt does not know, or not any more.
_NO_DOMAIN = "failed to get domain"
# libvirt's domaincheckpoint.rng; the longest file name less ".xml.new".
CHECKPOINT_NAME = re.compile(r"[a-zA-Z0-9_-][a-zA-Z0-9_.-]{0,246}")


class PausingListener:
    """Where no events come, waiting is sleeping."""

    async def wait(self, seconds: float) -> None:
        """Return after `seconds`."""
        await trio.sleep(seconds)


class Domain:
    """A domain of libvirt's: a Monitor, its disks, its checkpoints. Made by `connect`."""

    def __init__(self, name: str, uri: str | None) -> None:
        self._name = name
        self._uri = uri
        self._version = qmp.Version(0, 0, 0)
        self._command_line = ""
        self._peer: qmp.Peer | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> qmp.Version:
        return self._version

    @property
    def peer(self) -> qmp.Peer | None:
        return self._peer

    @property
    def folder(self) -> str | None:
        """The folder that libvirt made for this domain, which its QEMU may use; None if not known."""
        match = _DOMAIN_FOLDER.search(self._command_line)
        return match[1] if match and os.path.isdir(match[1]) else None

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        within: float = qmp.TIMEOUT,
    ) -> Any:
        """Carry out a QMP command; see qmp.Monitor."""
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = dict(arguments)
        words = ["qemu-monitor-command", self._name, json.dumps(message)]
        # A virsh that was killed may have sent the command or not, and libvirt may carry it out after a
        # later one: it is never killed before its time is up.
        with trio.move_on_after(within, shield=True) as scope:
            result = await self.run(*words)
        if scope.cancelled_caught:
            raise qmp.TimeoutError(command, within)
        await trio.lowlevel.checkpoint_if_cancelled()
        if result.returncode != 0:
            said = f"domain {self._name}: {_said(result)} (at {command})"
            raise (qmp.MonitorError if await self._runs() else qmp.Disconnected)(said)
        try:
            reply = json.loads(result.stdout)
            if "error" not in reply:
                return reply["return"]
        except (ValueError, KeyError, TypeError) as error:
            raise qmp.ProtocolError(
                f"domain {self._name}: not QMP: {result.stdout[:60]!r}"
            ) from error
        raise qmp.CommandError(command, arguments, reply)

    @contextlib.contextmanager
    def listen(self, *events: str) -> Iterator[PausingListener]:
        """Return what waits by sleeping."""
        yield PausingListener()

    async def wait_lost(self) -> qmp.MonitorError:
        """Return once the domain has stopped."""
        while True:
            await trio.sleep(_LOOK)
            if not await self._runs():
                return qmp.Disconnected(f"domain {self._name}: is not running any more")

    async def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `virsh WORDS...`; UserError when there is no virsh."""
        virsh = os.environ.get("POSTHOC_VIRSH", "virsh")
        command = [virsh, *(["--connect", self._uri] if self._uri else []), "--quiet", *words]
        try:
            raw = await trio.run_process(
                command,
                stdin=subprocess.DEVNULL,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                # The terminal's Ctrl-C is for us, who may have to wait for what is under way.
                process_group=0,
                env={**os.environ, "LC_ALL": "C"},
            )
        except OSError as error:
            raise errors.ToolError(command, errors.reason(error)) from error
        return subprocess.CompletedProcess(
            command, raw.returncode, os.fsdecode(raw.stdout), os.fsdecode(raw.stderr)
        )

    async def disks(self) -> dict[str, str]:
        """Return the device's id by target ("vda") of every disk."""
        xml = ElementTree.fromstring(await self._ask("dumpxml", self._name))
        found = {}
        for disk in xml.iterfind("./devices/disk"):
            target, alias = disk.find("target"), disk.find("alias")
            if target is not None and alias is not None:
                found[target.attrib["dev"]] = alias.attrib["name"]
        return found

    async def device_of(self, target: str) -> str:
        """Return the id of the device that is `target` ("vda"); UserError if there is none."""
        disks = await self.disks()
        if target not in disks:
            known = ", ".join(sorted(disks)) or "none"
            raise errors.UserError(
                f"{target}: domain {self._name} has no such disk (it has: {known})"
            )
        return disks[target]

    async def checkpoint(self, name: str) -> dict[str, str] | None:
        """Return the bitmap by target ("vda") of the checkpoint `name`; None where there is none."""
        if name not in (await self._ask("checkpoint-list", self._name, "--name")).split():
            return None
        text = await self._ask("checkpoint-dumpxml", self._name, name, "--no-domain")
        disks = ElementTree.fromstring(text).iterfind("./disks/disk")
        return {
            disk.attrib["name"]: disk.get("bitmap", name)
            for disk in disks
            if disk.get("checkpoint") != "no"
        }

    async def register_checkpoint(self, name: str, targets: Sequence[str]) -> None:
        """Tell libvirt of the bitmap `name` of the disks `targets` as a checkpoint.

        It must be there, persistent and recording, and named like the checkpoint ("virsh
        checkpoint-create --redefine"; libvirt's formatcheckpoint). A checkpoint of that name stays where it
        is of these very bitmaps; one of others would be lost, so that UserError is raised.
        """
        there = await self.checkpoint(name)
        if there == dict.fromkeys(targets, name):
            return
        if there is not None:
            raise errors.UserError(f"there is one of that name by now, of {', '.join(there)}")
        root = ElementTree.Element("domaincheckpoint")
        ElementTree.SubElement(root, "name").text = name
        ElementTree.SubElement(root, "creationTime").text = str(int(time.time()))
        disks = ElementTree.SubElement(root, "disks")
        for target in sorted(await self.disks()):
            recorded = {"checkpoint": "bitmap", "bitmap": name}
            attributes = recorded if target in targets else {"checkpoint": "no"}
            ElementTree.SubElement(disks, "disk", {"name": target, **attributes})
        with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
            file.write(ElementTree.tostring(root, "unicode"))
            file.flush()
            await self._ask("checkpoint-create", self._name, file.name, "--redefine")

    async def _runs(self) -> bool:
        """Return whether the domain runs, or may: while libvirtd is restarted nobody can tell."""
        result = await self.run("domid", self._name)
        if result.returncode != 0:
            return _NO_DOMAIN not in result.stderr
        return result.stdout.strip() not in ("", "-")

    async def _ask(self, *words: str) -> str:
        result = await self.run(*words)
        if result.returncode != 0:
            kind = qmp.Disconnected if _NO_DOMAIN in result.stderr else errors.UserError
            raise kind(f"virsh {words[0]} {self._name}: {_said(result)}")
        return result.stdout

    async def _look(self) -> None:
        """Fill in what does not change while the domain runs."""
        if (await self._ask("domid", self._name)).strip() in ("", "-"):
            raise qmp.Disconnected(f"domain {self._name} does not run: posthoc diff is for it")
        answer = await self.execute("query-version")
        with qmp.understanding("query-version"):
            numbers = answer["qemu"]
            self._version = qmp.Version(numbers["major"], numbers["minor"], numbers["micro"])
        uuid = (await self._ask("domuuid", self._name)).strip()
        if (found := _process_of(uuid)) is not None:
            self._peer, self._command_line = found


def _said(result: subprocess.CompletedProcess[str]) -> str:
    """Return virsh's error as one line."""
    return " ".join(result.stderr.split()).removeprefix("error: ") or f"exit {result.returncode}"


def _process_of(uuid: str) -> tuple[qmp.Peer, str] | None:
    """Find the QEMU process of a domain by the uuid that its command line sets."""
    for folder in pathlib.Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            # Not any word: a program may be told a domain by its uuid, posthoc for one.
            if ("-uuid", uuid) in itertools.pairwise(words):
                owner = qmp.process_owner(int(folder.name))
                return None if owner is None else (owner, " ".join(words))
    return None


@contextlib.asynccontextmanager
async def connect(name: str, uri: str | None = None) -> AsyncIterator[Domain]:
    """Reach the running domain `name` at libvirt's `uri` (None: virsh's default). Raises UserError."""
    domain = Domain(name, uri)
    await domain._look()
    yield domain
