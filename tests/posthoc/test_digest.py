# SPDX-License-Identifier: Apache-2.0
"""posthoc digest: written, used as a reference, and verified."""

import json
import pathlib

import pytest

from tests import command, oracle, qemu
from tests.posthoc import images

SEGMENT = images.SEGMENT


@pytest.mark.parametrize("granularity", [None, "4K"])
def test_a_digest_stands_for_its_reference(tmp_path: pathlib.Path, granularity: str | None) -> None:
    """The map against the digest is the map against the image, at the digest's granularity."""
    live, reference = images.pair(tmp_path, changed=[0, 5, 63])
    manifest, dirty = tmp_path / "full.digest", tmp_path / "map.qcow2"
    option = [] if granularity is None else ["--granularity", granularity]
    command.posthoc("digest", reference, "-o", manifest, *option)
    reference.rename(tmp_path / "out-of-reach")
    command.posthoc("diff", live, manifest, "-o", dirty, status=1)
    size = SEGMENT if granularity is None else 4096
    expected = oracle.differing(live, tmp_path / "out-of-reach", size)
    assert qemu.dirty_segments(dirty, size) == expected


def test_a_digest_of_a_vpc_stands_for_it_though_it_is_longer(tmp_path: pathlib.Path) -> None:
    """A vpc ends in zeros up to a whole cylinder, and so does its digest: they are told and left out."""
    live, reference = images.pair(tmp_path, changed=[0, 5, 63])
    vpc, manifest, dirty = (tmp_path / name for name in ("vpc", "full.digest", "map.qcow2"))
    qemu.convert(reference, vpc, "vpc")
    command.posthoc("digest", f"vpc:{vpc}", "-o", manifest)
    result = command.posthoc("diff", live, manifest, "-o", dirty, status=1)
    assert f"{manifest} is " in result.stderr
    assert "longer than the live disk, because sizes are rounded up there" in result.stderr
    assert qemu.dirty_segments(dirty, SEGMENT) == {0, 5, 63}
    assert command.posthoc("diff", reference, manifest).stdout
    with open(live, "r+b") as stream:
        stream.truncate(63 * SEGMENT)
    assert "--allow-shrunk" in command.posthoc("diff", live, manifest, status=2).stderr


def test_verify_tells_an_image_from_another(tmp_path: pathlib.Path) -> None:
    live, reference = images.pair(tmp_path, changed=[1, 2])
    manifest = tmp_path / "full.digest"
    written = command.posthoc("digest", reference, "-o", manifest, "--json")
    facts = json.loads(written.stdout)
    assert (facts["size"], facts["granularity"], facts["unreadable"]) == (4 << 20, SEGMENT, 0)
    assert facts["length"] == manifest.stat().st_size
    command.posthoc("digest", reference, "--verify", manifest)
    told = command.posthoc("digest", live, "--verify", manifest, "--json", status=1)
    assert json.loads(told.stdout)["differing"] == 2 * SEGMENT


@pytest.mark.parametrize(
    "change", [-SEGMENT, -1000, SEGMENT], ids=["shorter", "cut-within-a-segment", "longer"]
)
def test_an_image_of_another_size_is_another(tmp_path: pathlib.Path, change: int) -> None:
    """Also where all that there is of both is equal."""
    _, reference = images.pair(tmp_path)
    manifest = tmp_path / "full.digest"
    command.posthoc("digest", reference, "-o", manifest)
    with open(reference, "r+b") as stream:
        stream.truncate((4 << 20) + change)
    told = command.posthoc("digest", reference, "--verify", manifest, "--json", status=1)
    facts = json.loads(told.stdout)
    assert facts["beyond"] - facts["missing"] == change


def test_a_live_disk_cut_within_a_segment_is_compared_with_a_digest(tmp_path: pathlib.Path) -> None:
    """Its last segment differs: of what was hashed a part is missing."""
    live, reference = images.pair(tmp_path, changed=[5])
    manifest, dirty = tmp_path / "full.digest", tmp_path / "map.qcow2"
    command.posthoc("digest", reference, "-o", manifest)
    with open(live, "r+b") as stream:
        stream.truncate((4 << 20) - 1024)
    command.posthoc("diff", live, manifest, "--allow-shrunk", "-o", dirty, status=1)
    assert qemu.dirty_segments(dirty, SEGMENT) == {5, 63}
    told = command.posthoc("estimate", live, manifest, "--allow-shrunk", "--json")
    assert json.loads(told.stdout)["sampled_differing"] == 2


def test_the_reference_may_be_of_any_format(tmp_path: pathlib.Path) -> None:
    live, reference = images.pair(tmp_path, changed=[7])
    qemu.convert(reference, tmp_path / "full.qcow2", "qcow2", options="cluster_size=4096")
    command.posthoc("digest", f"qcow2:{tmp_path}/full.qcow2", "-o", tmp_path / "full.digest")
    told = command.posthoc("diff", live, tmp_path / "full.digest", "--json", status=1)
    assert json.loads(told.stdout)["differing"] == SEGMENT


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        pytest.param(["-o", "full.manifest"], "let it end in .digest", id="name"),
        pytest.param(["--verify", "live.raw"], "is no manifest", id="verify-name"),
        pytest.param(["--verify", "missing.digest"], "No such file", id="missing"),
        pytest.param(["--verify", "foreign.digest"], "no digest of posthoc's", id="foreign"),
        pytest.param(["--verify", "foreign.fidx"], "no fixed index", id="foreign-index"),
        pytest.param(["-o", "missing/full.digest"], "no folder", id="folder"),
        pytest.param(
            ["-o", "full.digest", "--granularity", "5K"], "power of two", id="granularity"
        ),
        pytest.param(
            ["--verify", "foreign.digest", "--granularity", "4K"], "leave", id="verify-granularity"
        ),
        pytest.param([], "one of the arguments", id="nothing-asked"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: pathlib.Path, arguments: list[str], reason: str) -> None:
    images.pair(tmp_path)
    for name in ("foreign.digest", "foreign.fidx"):
        (tmp_path / name).write_text("not a manifest")
    told = command.posthoc("digest", "reference.raw", *arguments, status=2, cwd=tmp_path)
    assert reason in told.stderr
    assert told.stdout == ""
    assert "Traceback" not in told.stderr


def test_an_unreadable_part_is_told_and_differs(tmp_path: pathlib.Path) -> None:
    """Exit 3 with a manifest that is valid: what could not be read equals nothing."""
    _, reference = images.pair(tmp_path)
    trigger = tmp_path / "fail"
    trigger.touch()
    fail = ["error-pread=EIO", "error-pread-rate=100%", f"error-pread-file={trigger}"]
    manifest = tmp_path / "full.digest"
    with qemu.nbdkit("file", reference, *fail, filters=["error"]) as uri:
        told = command.posthoc("digest", uri, "-o", manifest, "--json", status=3)
        assert json.loads(told.stdout)["unreadable"] == 4 << 20
        assert "could not be read" in told.stderr
    told = command.posthoc("digest", reference, "--verify", manifest, "--json", status=1)
    assert json.loads(told.stdout)["differing"] == 4 << 20
