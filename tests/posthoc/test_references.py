# SPDX-License-Identifier: Apache-2.0
"""References of which only hashes are left, and encrypted ones, on the command line."""

import pathlib

import pytest

from dirtymap import images as disk_images
from dirtymap.images import base
from posthoc import cli
from tests import command, oracle, qemu
from tests.dirtymap.images import test_fidx
from tests.posthoc import images, test_diff, test_verify
from tests.posthoc.images import MIB, SEGMENT

Path = pathlib.Path

SECRET = "open sesame"


@pytest.fixture
def digest(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A live disk, the reference that is out of reach, and its digest."""
    live, reference = images.pair(tmp_path, changed=[3, 40])
    manifest = tmp_path / "full.digest"
    assert cli.main(["digest", str(reference), "-o", str(manifest)]) == 0
    return live, reference.rename(tmp_path / "out-of-reach"), manifest


def test_a_digest_is_a_mounts_reference(
    tmp_path: Path, mountpoint: Path, digest: tuple[Path, Path, Path]
) -> None:
    live, _, manifest = digest
    output = tmp_path / "map.qcow2"
    with command.mounted(live, manifest, mountpoint, "--output", output) as mount:
        assert command.until_state(mount, "complete")["differing"] == 2 * SEGMENT
        images.overwrite(mount / "disk", 10 * SEGMENT, b"new")
    assert qemu.dirty_segments(output, SEGMENT) == {3, 10, 40}


def test_a_digest_judges_a_map(tmp_path: Path, digest: tuple[Path, Path, Path]) -> None:
    """verify against the digest says what verify against the image says."""
    live, reference, manifest = digest
    right = tmp_path / "right.qcow2"
    test_diff.diff(live, reference, "-o", right, status=1)
    assert test_verify.verify(right, live, manifest, status=0)["needless"] == 0
    images.overwrite(live, 50 * SEGMENT, b"later")
    facts = test_verify.verify(right, live, manifest, status=1)
    assert facts["missed_extents"] == [{"start": 50 * SEGMENT, "length": SEGMENT}]


def test_an_index_of_proxmox_is_a_reference(tmp_path: Path, mountpoint: Path) -> None:
    """Of its chunks of 4 MiB those that changed are dirty; the last is a part of one."""
    content = bytearray(test_fidx.content())
    index, live = tmp_path / "drive-scsi0.img.fidx", tmp_path / "live.raw"
    index.write_bytes(test_fidx.index(content))
    live.write_bytes(content)
    assert test_diff.diff(live, index, status=0)["dirty"] == 0
    images.overwrite(live, test_fidx.CHUNK - 1, b"\0\xff")
    images.overwrite(live, test_fidx.SIZE - 1, b"\xff")
    output = tmp_path / "map.qcow2"
    test_diff.diff(live, index, "-o", output, status=1)
    # At 2 MiB, the coarsest that a map has: the end of the first chunk, the second (zeros before), the last.
    assert qemu.dirty_segments(output, 2 * MIB) == {0, 1, 2, 6}
    with command.mounted(live, index, mountpoint) as mount:
        command.until_state(mount, "complete")
        found = qemu.dirty_segments(mount / "dirty.qcow2", SEGMENT)
    before = tmp_path / "before.raw"
    before.write_bytes(content)
    assert oracle.differing(live, before, SEGMENT) <= found
    assert max(found) == test_fidx.SIZE // SEGMENT


def test_secrets_open_encrypted_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each in its file, tried in order; the wrong one alone is refused."""
    _, reference = images.pair(tmp_path, changed=[5])
    for name, text in (("right", SECRET), ("wrong", "open barley")):
        (tmp_path / name).write_text(text)
    encrypted = tmp_path / "reference.luks"
    qemu.create_encrypted(encrypted, 4 * MIB, SECRET)
    options = disk_images.Options(secrets=(str(tmp_path / "right"),))
    image = disk_images.open(f"luks:{encrypted}", writable=True, options=options)
    assert isinstance(image, base.WritableImage)
    image.write(0, reference.read_bytes())
    image.flush()
    image.close()
    # Names as the user writes them, from where the user is.
    monkeypatch.chdir(tmp_path)
    pair = ["live.raw", "luks:reference.luks"]
    both = ["--secret", "wrong", "--secret", "right"]
    assert test_diff.diff(*pair, "--secret", "right", status=1)["differing"] == SEGMENT
    assert test_diff.diff(*pair, *both, status=1)["differing"] == SEGMENT
    for secret, reason in (("wrong", "Invalid password"), ("none", "is missing")):
        assert reason in test_diff.refused(capsys, [*pair, "--secret", secret])
    assert "--secret" in test_diff.refused(capsys, pair)
