# SPDX-License-Identifier: Apache-2.0
"""Mounting with a /dev/fuse of our own: by mount(2) as root, by fusermount3 otherwise.

libfuse would keep the descriptor to itself; here the server reads it. The mount's options are the same
either way (mount.fuse3(8)), and the same as mount.py gives libfuse for the python data path.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess

from dirtymap import errors
from overlayfs import datapath

# sys/mount.h
_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024


def mount(where: str, options: datapath.MountOptions) -> int:
    """Mount on the directory `where` and return the descriptor of /dev/fuse; the caller closes it.

    Raises UserError.
    """
    if os.geteuid() == 0:
        return _mount_as_root(where, options)
    return _mount_as_user(where, options)


def _mount_as_root(where: str, options: datapath.MountOptions) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise errors.UserError(f"/dev/fuse: {errors.reason(error)}") from None
    words = [f"fd={fd}", "rootmode=40000", "user_id=0", "group_id=0", "default_permissions"]
    if options.allow_other:
        words.append("allow_other")
    failed = libc.mount(
        os.fsencode(options.name),
        os.fsencode(where),
        b"fuse.posthoc",
        ctypes.c_ulong(_MS_NOSUID | _MS_NODEV | _MS_NOATIME),
        ",".join(words).encode(),
    )
    if failed:
        os.close(fd)
        reason = os.strerror(ctypes.get_errno())
        raise errors.UserError(f"{where}: the kernel refused the FUSE mount: {reason}")
    return fd


def _mount_as_user(where: str, options: datapath.MountOptions) -> int:
    """Let fusermount3 mount; it sends the descriptor over the socket in _FUSE_COMMFD."""
    name = options.name.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={name}", "subtype=posthoc", "default_permissions", "noatime"]
    if options.allow_other:
        words.append("allow_other")
    fusermount = os.environ.get("POSTHOC_FUSERMOUNT", "fusermount3")
    command = [fusermount, "-o", ",".join(words), "--", where]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            done = subprocess.run(
                command,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                check=False,
            )
        except OSError as error:
            raise errors.ToolError(command, errors.reason(error)) from None
        if done.returncode != 0:
            said = os.fsdecode(done.stderr).strip()
            raise errors.ToolError(command, said or f"ended with status {done.returncode}")
        _, descriptors, _, _ = socket.recv_fds(ours, 1, 1)
    if not descriptors:
        raise errors.ToolError(command, "mounted, but gave no descriptor")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def unmount(where: str) -> None:
    """Take away at once what `mount` has just mounted and nobody uses; failures are nobody's loss."""
    if os.geteuid() == 0:
        command = [os.environ.get("POSTHOC_UMOUNT", "umount"), "--internal-only", "--lazy", where]
    else:
        command = [os.environ.get("POSTHOC_FUSERMOUNT", "fusermount3"), "-u", "-z", "--", where]
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
