# SPDX-License-Identifier: Apache-2.0
"""What a session knows of the mount that its keeper holds."""

import os
from pathlib import Path

from overlayfs import datapath
from overlayfs.datapath import keeper, kept, kernel, shared


def test_requests_that_nobody_has_read_are_seen(tmp_path: Path) -> None:
    """The kernel's first request waits from the mount on; whoever looks does not take it."""
    memory = shared.Memory.create(1 << 20, 4096, threads=1, max_write=4096)
    descriptors = keeper.Descriptors(memory.fd, *keeper.pair(kept.SOCKET_BUFFER))
    mount = kept.KeptMount(memory, descriptors, tmp_path / "keeper", program=Path("/bin/true"))
    where = tmp_path / "mnt"
    where.mkdir()
    assert not mount.has_waiting()
    descriptors.fuse = kernel.mount(str(where), datapath.MountOptions())
    try:
        assert mount.has_waiting()
        assert mount.has_waiting()
        os.read(descriptors.fuse, 1 << 20)
        assert not mount.has_waiting()
    finally:
        kernel.unmount(str(where))
        descriptors.close()
        memory.close()
