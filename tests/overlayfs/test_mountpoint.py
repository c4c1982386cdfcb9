# SPDX-License-Identifier: Apache-2.0
"""Is a place fit to mount on, and who is mounted there."""

import os
import pathlib
import subprocess
from collections.abc import Callable

import pytest

from dirtymap import errors
from overlayfs import mountpoint as place
from overlayfs import unmount


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        pytest.param(lambda path: path.rmdir(), "no such directory", id="missing"),
        pytest.param(lambda path: (path.rmdir(), path.touch()), "not a directory", id="a-file"),
        pytest.param(
            lambda path: (path / "x").touch(), "the directory is not empty", id="not-empty"
        ),
        pytest.param(
            lambda path: subprocess.run(["mount", "-t", "tmpfs", "none", path], check=True),
            "tmpfs is mounted here already: unmount it or choose another",
            id="mounted",
        ),
    ],
)
def test_unfit_mountpoint_is_one_line(
    mountpoint: pathlib.Path, prepare: Callable[[pathlib.Path], object], reason: str
) -> None:
    """The line names the mountpoint as it was written, and what is wrong with it."""
    prepare(mountpoint)
    try:
        with pytest.raises(errors.UserError) as error:
            place.check(mountpoint)
        assert str(error.value) == f"{mountpoint}: {reason}"
    finally:
        if os.path.ismount(mountpoint):
            subprocess.run(["umount", mountpoint], check=True)


def test_links_are_resolved(mountpoint: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What the kernel's table of mounts will say is what `check` returns."""
    link = tmp_path / "link"
    link.symlink_to(mountpoint)
    assert place.check(link) == str(mountpoint)
    (tmp_path / "parent").symlink_to(tmp_path)
    assert place.check(tmp_path / "parent" / "mnt") == str(mountpoint)


def test_relative_path_and_trailing_slash(
    mountpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As people type it."""
    monkeypatch.chdir(mountpoint.parent)
    assert place.check("mnt/") == str(mountpoint)
    assert place.check("./mnt") == str(mountpoint)


def test_find_gives_the_uppermost_of_several(mountpoint: pathlib.Path) -> None:
    """Mounts may be laid over each other; each has an identity of its own."""
    assert place.find(str(mountpoint)) is None
    try:
        subprocess.run(["mount", "-t", "tmpfs", "lower", mountpoint], check=True)
        lower = place.find(str(mountpoint))
        subprocess.run(["mount", "-t", "tmpfs", "upper", mountpoint], check=True)
        upper = place.find(str(mountpoint))
        assert lower is not None
        assert upper is not None
        assert (lower.source, upper.source) == ("lower", "upper")
        assert lower.identity != upper.identity
    finally:
        while place.find(str(mountpoint)) is not None:
            subprocess.run(["umount", mountpoint], check=True)


@pytest.mark.parametrize("name", ["with blank", "tab\there", "back\\slash", "line\nbreak", "é"])
def test_names_that_the_kernel_escapes(tmp_path: pathlib.Path, name: str) -> None:
    """A mountpoint of any name is found in the table."""
    folder = tmp_path / name
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        found = place.find(str(folder))
        assert found is not None
        assert found.kind == "tmpfs"
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("name", ["\r", "\x0b", "\x85", "\u2028", "\udcff"])
def test_names_that_the_kernel_does_not_escape(name: str) -> None:
    """One such mount of anybody's, and the table could not be read: Unicode ends a line there, or it is no UTF-8."""
    text = f"36 35 98:0 / /mnt/{name}x rw,noatime master:1 - ext3 /dev/root rw\n"
    (found,) = place.parse(text)
    assert (found.path, found.owner) == (f"/mnt/{name}x", None)


@pytest.mark.parametrize("options", ["rw,user_id=65534,group_id=0", "user_id=65534"])
def test_who_has_mounted(options: str) -> None:
    """A FUSE mount says whose it is."""
    (found,) = place.parse(f"36 35 0:40 / /m\\040nt rw - fuse.posthoc post\\040hoc {options}\n")
    assert found == place.Mount(36, "/m nt", "fuse.posthoc", "post hoc", 65534)


async def test_unmount_spares_what_is_not_ours(mountpoint: pathlib.Path) -> None:
    """A mount that somebody laid over ours, or made after it, stays."""
    subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=True)
    try:
        assert await unmount.unmount(str(mountpoint), lambda mount: mount.identity == -1) is None
        assert place.find(str(mountpoint)) is not None
        assert await unmount.unmount(str(mountpoint), lambda mount: True) is None
        assert place.find(str(mountpoint)) is None
    finally:
        if place.find(str(mountpoint)) is not None:
            subprocess.run(["umount", mountpoint], check=True)


async def test_unmount_of_what_is_busy_is_lazy(mountpoint: pathlib.Path) -> None:
    """An open file keeps nobody from unmounting: the name is free at once."""
    subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=True)
    with (mountpoint / "file").open("w") as file:
        assert await unmount.unmount(str(mountpoint), lambda mount: True) is None
        assert place.find(str(mountpoint)) is None
        file.write("still open")


async def test_failing_tool_is_told(
    mountpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be unmounted is reported with what the command said, or that it is missing."""
    subprocess.run(["mount", "-t", "tmpfs", "none", mountpoint], check=True)
    try:
        monkeypatch.setenv("POSTHOC_UMOUNT", "/no/such/umount")
        said = await unmount.unmount(str(mountpoint), lambda mount: True)
        assert said == "/no/such/umount: No such file or directory"
        monkeypatch.setenv("POSTHOC_UMOUNT", "false")
        assert await unmount.unmount(str(mountpoint), lambda mount: True) == (
            "false ended with status 1"
        )
    finally:
        subprocess.run(["umount", mountpoint], check=True)
