# SPDX-License-Identifier: Apache-2.0
"""What tells whether a reference is still the one that it was."""

import os
import pathlib
import shutil

import pytest

from posthoc.sessions import ways
from tests import qemu

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    """An overlay of an overlay of a raw disk, the uppermost first."""
    base, middle, top = (tmp_path / name for name in ("base.raw", "middle.qcow2", "top.qcow2"))
    qemu.create(base, MIB)
    qemu.create(middle, MIB, "qcow2", backing=(base, "raw"))
    qemu.create(top, MIB, "qcow2", backing=(middle, "qcow2"))
    return [top, middle, base]


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_each_layer_of_a_chain_tells(chain: list[pathlib.Path], depth: int) -> None:
    spec = f"qcow2:{chain[0]}"
    before = ways.fingerprint(spec)
    assert before is not None
    assert ways.fingerprint(spec) == before
    later = chain[depth].stat().st_mtime_ns + 1
    os.utime(chain[depth], ns=(later, later))
    assert ways.fingerprint(spec) != before


@pytest.mark.parametrize("driver", ["qcow2", "vmdk", "vdi", "vhdx", "vpc"])
def test_a_file_of_any_format_tells(tmp_path: pathlib.Path, driver: str) -> None:
    qemu.create(tmp_path / "x", MIB, driver)
    assert ways.fingerprint(f"{driver}:{tmp_path}/x") is not None


def test_a_copy_is_another_file(chain: list[pathlib.Path]) -> None:
    """Even with its times: who changed it meanwhile may have put them back."""
    before = ways.fingerprint(str(chain[2]))
    assert before is not None
    shutil.copy2(chain[2], f"{chain[2]}.new")
    os.rename(f"{chain[2]}.new", chain[2])
    assert ways.fingerprint(str(chain[2])) != before


@pytest.mark.parametrize(
    "kind", ["missing", "broken-chain", "export", "data-file", "flat", "device"]
)
def test_what_cannot_be_told_from_another_has_none(tmp_path: pathlib.Path, kind: str) -> None:
    """Where its bytes can change, and no file's name, size or time of change that is looked at says so."""
    path = tmp_path / "x"
    if kind == "export":
        assert ways.fingerprint("nbd://localhost/x") is None
    elif kind == "device":
        qemu.create(path, MIB)
        with qemu.loop_device(path) as device:
            assert ways.fingerprint(str(device)) is None
    elif kind == "flat":
        qemu.create(path, MIB, "vmdk", options="subformat=monolithicFlat")
        assert ways.fingerprint(f"vmdk:{path}") is None
    elif kind == "data-file":
        qemu.create(path, MIB, "qcow2", options=f"data_file={tmp_path}/data")
        assert ways.fingerprint(f"qcow2:{path}") is None
    else:
        if kind == "broken-chain":
            qemu.create(tmp_path / "base", MIB)
            qemu.create(path, MIB, "qcow2", backing=(tmp_path / "base", "raw"))
            (tmp_path / "base").unlink()
        assert ways.fingerprint(f"qcow2:{path}") is None
