# SPDX-License-Identifier: Apache-2.0
"""A guest's root as a cpio archive, built in memory: no tool, no device nodes, no root needed.

The kernel unpacks several archives one after the other, so that what all guests share is made once
and what one of them runs is appended. Format: "newc", Documentation/driver-api/early-userspace/
buffer-format.rst of the kernel.
"""

import gzip
import lzma
import pathlib
import re
import shutil
import stat
import subprocess

# In a Debian kernel modules; in others built in. ext4 asks for crc32c by name, as modprobe would.
MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "ext4")
_OPTIONAL = {"crc32c_generic"}


class Archive:
    """Files in newc order; `finish()` is called once, at the end."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._folders: set[str] = set()
        self._inode = 0

    def file(self, name: str, content: bytes, mode: int = 0o755) -> None:
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, content)

    def folder(self, name: str) -> None:
        if name not in self._folders:
            self._folders.add(name)
            self._parents(name)
            self._entry(name, stat.S_IFDIR | 0o755, b"")

    def link(self, name: str, target: str) -> None:
        self._parents(name)
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)

    def _parents(self, name: str) -> None:
        parent = name.rpartition("/")[0]
        if parent:
            self.folder(parent)

    def _entry(self, name: str, mode: int, content: bytes) -> None:
        self._inode += 1
        text = name.encode() + b"\0"
        # inode, mode, uid, gid, nlink, mtime, size, device and rdevice pairs, name's length, check
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(text), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields)
        self._parts += [_padded(header + text), _padded(content)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def base(busybox: pathlib.Path, modules: pathlib.Path) -> bytes:
    """Return the archive every guest has: busybox as /bin/sh, the modules, and /init."""
    archive = Archive()
    for folder in ("dev", "proc", "sys", "tmp", "mnt", "sbin"):
        archive.folder(folder)
    archive.file("bin/busybox", busybox.read_bytes())
    archive.link("bin/sh", "busybox")
    order = in_order(modules)
    for module in order:
        archive.file(f"modules/{module.name.partition('.')[0]}.ko", unpacked(module), 0o644)
    loads = "\n".join(f"insmod /modules/{module.name.partition('.')[0]}.ko" for module in order)
    archive.file("init", _INIT.replace("@MODULES@", loads).encode())
    return archive.finish()


def script(text: str, programs: tuple[str, ...] = ()) -> bytes:
    """Return the archive of one guest: its script, and programs of this machine with libraries.

    A program lies in /sbin, whatever its place is here.
    """
    archive = Archive()
    archive.file("script", text.encode())
    done: set[str] = set()
    for program in programs:
        path = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin")
        if path is None:
            raise RuntimeError(f"{program} is not installed")
        archive.file(f"sbin/{program}", pathlib.Path(path).read_bytes())
        for library in libraries(path):
            if library not in done:
                done.add(library)
                archive.file(library.lstrip("/"), pathlib.Path(library).read_bytes())
    return archive.finish()


def libraries(program: str) -> list[str]:
    """Return the files a dynamic program loads, as ldd tells them."""
    listing = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return re.findall(r"(/\S+) \(0x", listing)


def in_order(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of MODULES and of what they depend on, in an order that loads.

    The packages come without modules.dep: each module's own `depends=` tells.
    """
    files = {
        _plain(path.name.partition(".")[0]): path
        for path in folder.rglob("*.ko*")
        if ".ko" in path.suffixes
    }
    builtin = {_plain(pathlib.Path(line).stem) for line in _builtin(folder)}
    order: list[pathlib.Path] = []

    def add(name: str) -> None:
        if name not in files:
            if name not in builtin | _OPTIONAL:
                raise RuntimeError(f"the kernel in {folder} has no module {name}")
            return
        for needed in depends(unpacked(files[name])):
            add(needed)
        if files[name] not in order:
            order.append(files[name])

    for name in MODULES:
        add(name)
    return order


def _builtin(folder: pathlib.Path) -> list[str]:
    return (folder / "modules.builtin").read_text().splitlines()


def _plain(name: str) -> str:
    return name.replace("-", "_")


def depends(module: bytes) -> list[str]:
    """Return the names in a module's `depends=` (section .modinfo: strings that end in a zero)."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [_plain(name) for name in found[1].decode().split(",") if name] if found else []


def unpacked(path: pathlib.Path) -> bytes:
    """Return a module's bytes; distributions compress them in three ways."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dc"], input=data, check=True, capture_output=True).stdout
    return data


# A shell of busybox prefers its own applets: a script calls a program of the host by its full path.
_INIT = """#!/bin/sh
/bin/busybox mkdir -p /busybox
/bin/busybox --install -s /busybox
export PATH=/usr/sbin:/sbin:/usr/bin:/bin:/busybox
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
@MODULES@
while [ -n "$(ls /sys/bus/virtio/devices)" ] && [ ! -b /dev/vda ]; do sleep 0.1; done
echo "guest: script begins"
sh /script
status=$?
sync
echo "guest: script ended with $status"
poweroff -f
"""
