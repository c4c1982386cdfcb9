# SPDX-License-Identifier: Apache-2.0
"""What was decided without reading is told, by its reason."""

import pathlib

from tests import command, qemu
from tests.posthoc import images
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path


def test_reflinks(tmp_path: Path, mountpoint: Path) -> None:
    """A reflink copy, changed in one place and then through the mount: the rest is not read."""
    with qemu.reflinks(tmp_path / "xfs") as folder:
        live, reference = images.pair(folder)
        live.unlink()
        qemu.reflink(reference, live)
        images.overwrite(live, 3 * SEGMENT, b"changed")
        with command.mounted(live, reference, mountpoint) as mount:
            status = command.until_state(mount, "complete")
            assert status["differing"] == SEGMENT
            saved = status["savings"]["reflinks"]
            assert 3 * MIB < saved == status["skipped"] < 4 * MIB
            assert f"savings: reflinks {saved} (" in (mount / "status").read_text()
            images.overwrite(mount / "disk", 10 * SEGMENT, b"changed")
            command.control(mount, "rescan")
            assert command.until_state(mount, "complete")["dirty"] == 2 * SEGMENT


def test_backing(tmp_path: Path, mountpoint: Path) -> None:
    """Two overlays of one base: only what lies in either is read."""
    _, base = images.pair(tmp_path)
    for name, segment in (("live", 3), ("reference", 40)):
        path = tmp_path / f"{name}.qcow2"
        qemu.create(path, 4 * MIB, "qcow2", backing=(base, "raw"))
        qemu.io(path, f"write -P 9 {segment * SEGMENT} {SEGMENT}", format="qcow2")
    specs = [f"qcow2:{tmp_path}/{name}.qcow2" for name in ("live", "reference")]
    with command.mounted(specs[0], specs[1], mountpoint) as mount:
        status = command.until_state(mount, "complete")
        assert status["differing"] == 2 * SEGMENT
        saved = status["savings"]["backing"]
        assert 3 * MIB < saved == status["skipped"] < 4 * MIB
        assert f"savings: backing {saved} (" in (mount / "status").read_text()
