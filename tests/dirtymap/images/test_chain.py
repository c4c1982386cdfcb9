# SPDX-License-Identifier: Apache-2.0
"""Backing chains: whose files they are, and that no format in them is guessed."""

import json
import os
import pathlib
from collections.abc import Callable

import pytest

from dirtymap import errors
from dirtymap.images import chain
from tests import qemu

MIB = 1 << 20


@pytest.fixture
def three(tmp_path: pathlib.Path) -> pathlib.Path:
    """top.qcow2 over middle.qcow2 over base.raw."""
    qemu.create(tmp_path / "base.raw", MIB)
    qemu.create(tmp_path / "middle.qcow2", MIB, "qcow2", backing=("base.raw", "raw"))
    qemu.create(tmp_path / "top.qcow2", 2 * MIB, "qcow2", backing=("middle.qcow2", "qcow2"))
    return tmp_path


def test_layers_are_told_from_the_top(three: pathlib.Path) -> None:
    found = chain.layers("qcow2:top", str(three / "top.qcow2"), "qcow2")
    assert [(layer.path, layer.driver, layer.size) for layer in found] == [
        (str(three / "top.qcow2"), "qcow2", 2 * MIB),
        (str(three / "middle.qcow2"), "qcow2", MIB),
        (str(three / "base.raw"), "raw", MIB),
    ]


def test_all_names_of_a_file_are_one_identity(three: pathlib.Path) -> None:
    os.link(three / "base.raw", three / "hard")
    os.symlink("base.raw", three / "soft")
    found = {chain.identity(str(three / name)) for name in ("base.raw", "hard", "soft")}
    assert len(found) == 1
    assert chain.identity(str(three / "top.qcow2")) not in found
    assert chain.identity(str(three / "missing")) is None


def test_the_same_file_read_in_another_way_is_another_layer(three: pathlib.Path) -> None:
    """A qcow2's bytes are not the disk that it holds."""
    one = chain.layers("x", str(three / "middle.qcow2"), "qcow2")[0]
    other = chain.layers("x", str(three / "middle.qcow2"), "raw")[0]
    assert one.is_same(one)
    assert not one.is_same(other)


def test_a_backing_file_without_a_format_is_refused(tmp_path: pathlib.Path) -> None:
    """QEMU would probe it, and a guest could have written what is found there."""
    qemu.create(tmp_path / "base.raw", MIB)
    qemu.create(tmp_path / "top.qcow2", MIB, "qcow2", backing=(tmp_path / "base.raw", "raw"))
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", "", tmp_path / "top.qcow2")
    _name_backing_without_format(tmp_path / "top.qcow2", str(tmp_path / "base.raw"))
    with pytest.raises(errors.ImageError, match="without its format"):
        chain.layers("qcow2:top.qcow2", str(tmp_path / "top.qcow2"), "qcow2")


def _name_backing_without_format(path: pathlib.Path, backing: str) -> None:
    """Write the backing file's name into the header and take its format out, as qemu-img before 6.1 did."""
    with open(path, "r+b") as stream:
        # The extension "Backing file format" becomes one that readers skip.
        header = stream.read(512)
        stream.seek(0)
        stream.write(header.replace(b"\xe2\x79\x2a\xca", b"\x12\x34\x56\x78"))
        name = backing.encode()
        # Free space within the header's cluster; backing_file_offset and _size are at 8 and 16.
        stream.seek(4096)
        stream.write(name)
        stream.seek(8)
        stream.write((4096).to_bytes(8, "big") + len(name).to_bytes(4, "big"))


def _file_json(path: object, **more: object) -> str:
    """A backing file's name as libvirt writes it: a qcow2 in the file at `path`."""
    return "json:" + json.dumps(
        {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}, **more}
    )


# A backing file's name, given its path.
NAMES = {
    "json": _file_json,
    "json-flat": lambda path: (
        "json:" + json.dumps({"driver": "qcow2", "file.driver": "file", "file.filename": str(path)})
    ),
    "json-no-protocol": lambda path: (
        "json:" + json.dumps({"driver": "qcow2", "file": {"filename": str(path)}})
    ),
    "json-harmless": lambda path: _file_json(path, **{"node-name": "n", "read-only": True}),
    "file": lambda path: f"file:{path}",
    "file-uri": lambda path: f"file://{path}",
}


@pytest.mark.parametrize("named", NAMES.values(), ids=NAMES)
def test_what_lies_below_a_file_named_in_another_way_is_looked_at_too(
    tmp_path: pathlib.Path, named: Callable[[pathlib.Path], str]
) -> None:
    """Such a name ended the walk: QEMU probed what lay below, and a guest's raw disk could name any file."""
    (tmp_path / "secret").write_bytes(b"secret".ljust(MIB))
    qemu.create(tmp_path / "evil.raw", MIB, "qcow2", backing=(tmp_path / "secret", "raw"))
    middle = tmp_path / "middle.qcow2"
    qemu.create(middle, MIB, "qcow2", backing=(tmp_path / "evil.raw", "raw"))
    top = tmp_path / "top.qcow2"
    qemu.create(top, MIB, "qcow2", backing=(named(middle), "qcow2"))
    found = chain.layers("x", str(top), "qcow2")
    assert [(layer.path, layer.driver) for layer in found] == [
        (str(top), "qcow2"),
        (str(middle), "qcow2"),
        (str(tmp_path / "evil.raw"), "raw"),
    ]
    _name_backing_without_format(middle, str(tmp_path / "evil.raw"))
    with pytest.raises(errors.ImageError, match="without its format"):
        chain.layers("x", str(top), "qcow2")


@pytest.mark.parametrize(
    ("backing", "kind"),
    [
        pytest.param("file:middle.qcow2", "qcow2", id="relative-to-who-knows-what"),
        pytest.param("nbd://localhost/disk", "qcow2", id="a-format-over-the-net"),
        pytest.param(_file_json("/middle", backing=None), "qcow2", id="another-backing"),
        pytest.param(_file_json("/middle", offset=512), "qcow2", id="a-part-of-a-file"),
        pytest.param(_file_json("middle"), "qcow2", id="json-relative"),
        pytest.param('json:{"driver": "qcow2", "file": "node"}', "qcow2", id="a-node"),
        pytest.param('json:{"driver": "qcow2", "file": {}}', "qcow2", id="no-file"),
        pytest.param('json:["qcow2"]', "qcow2", id="no-object"),
        pytest.param("json:{'driver': 'qcow2'}", "qcow2", id="no-json"),
        pytest.param('json:{"driver": ["qcow2"]}', "qcow2", id="no-name"),
        pytest.param("/middle", "copy-on-read", id="a-filter"),
        pytest.param(
            "json:"
            + json.dumps(
                {"driver": "raw", "file": {"driver": "qcow2", "file": {"filename": "/middle"}}}
            ),
            "raw",
            id="a-format-in-raw",
        ),
    ],
)
def test_a_name_that_cannot_be_followed_is_refused(
    tmp_path: pathlib.Path, backing: str, kind: str
) -> None:
    path = tmp_path / "top.qcow2"
    qemu.create(path, MIB, "qcow2")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", kind, path)
    with pytest.raises(errors.ImageError, match="name it by its path") as caught:
        chain.layers("qcow2:top", str(path), "qcow2")
    assert str(caught.value).startswith("qcow2:top: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backing", "kind"),
    [
        pytest.param("nbd://localhost/disk", "raw", id="raw"),
        pytest.param("nbd+unix:///?socket=/s", "raw", id="raw-behind-a-socket"),
        pytest.param(
            "json:"
            + json.dumps({"driver": "raw", "file": {"driver": "nbd", "server": {"type": "unix"}}}),
            "raw",
            id="json-raw",
        ),
        pytest.param('json:{"driver": "nbd", "server.type": "unix"}', "nbd", id="json-nbd"),
    ],
)
def test_raw_bytes_from_the_net_end_the_walk(
    tmp_path: pathlib.Path, backing: str, kind: str
) -> None:
    path = tmp_path / "top.qcow2"
    qemu.create(path, MIB, "qcow2")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", kind, path)
    found = chain.layers("x", str(path), "qcow2")
    assert [(layer.path, layer.driver) for layer in found[1:]] == [(None, kind)]


def test_a_plain_file_described_as_json_is_walked(tmp_path: pathlib.Path) -> None:
    """Its bytes are the disk, as those of a raw one are."""
    (tmp_path / "base").write_bytes(bytes(MIB))
    path = tmp_path / "top.qcow2"
    backing = "json:" + json.dumps({"driver": "file", "filename": str(tmp_path / "base")})
    qemu.create(path, MIB, "qcow2", backing=(backing, "file"))
    found = chain.layers("x", str(path), "qcow2")
    assert [(layer.path, layer.driver) for layer in found[1:]] == [(str(tmp_path / "base"), "file")]


def test_a_backing_that_is_no_file_ends_the_walk(tmp_path: pathlib.Path) -> None:
    backing = "json:" + json.dumps({"driver": "null-co", "size": MIB, "read-zeroes": True})
    path = tmp_path / "top.qcow2"
    qemu.create(path, MIB, "qcow2")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", backing, "-F", "null-co", path)
    found = chain.layers("x", str(path), "qcow2")
    assert [(layer.path, layer.identity) for layer in found[1:]] == [(None, None)]
    assert not found[1].is_same(found[1])


def test_a_chain_that_names_itself_ends(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "loop.qcow2"
    qemu.create(path, MIB, "qcow2")
    qemu.img("rebase", "-u", "-f", "qcow2", "-b", path, "-F", "qcow2", path)
    chain_limit = chain._DEEPEST
    try:
        chain._DEEPEST = 3
        with pytest.raises(errors.ImageError, match="chain of more than"):
            chain.layers("qcow2:loop", str(path), "qcow2")
    finally:
        chain._DEEPEST = chain_limit


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda path: None, "No such file", id="missing"),
        pytest.param(lambda path: path.write_bytes(b"x" * MIB), "not in qcow2 format", id="raw"),
        pytest.param(lambda path: path.mkdir(), "file", id="directory"),
        pytest.param(lambda path: path.write_bytes(b"QFI\xfb"), "qcow2", id="cut-short"),
    ],
)
def test_what_is_no_such_image_is_one_line(
    tmp_path: pathlib.Path, make: object, reason: str
) -> None:
    path = tmp_path / "image"
    make(path)  # type: ignore[operator]
    with pytest.raises(errors.ImageError, match=reason) as caught:
        chain.layers(f"qcow2:{path}", str(path), "qcow2")
    assert str(caught.value).startswith(f"qcow2:{path}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_backing_file_is_named(three: pathlib.Path) -> None:
    (three / "base.raw").unlink()
    with pytest.raises(errors.ImageError, match="its backing file .*base.raw cannot be opened"):
        chain.layers(f"qcow2:{three}/top.qcow2", str(three / "top.qcow2"), "qcow2")


def _layer(path: str | None, driver: str, *, encrypted: bool = False) -> chain.Layer:
    return chain.Layer(path, driver, MIB, encrypted, None)


@pytest.mark.parametrize(
    ("layers", "secrets", "options"),
    [
        pytest.param([_layer("/a", "vmdk")], [], "file.filename=/a,driver=vmdk", id="one"),
        pytest.param(
            [_layer("/a,b", "qcow2"), _layer("/c", "raw")],
            ["s0"],
            "file.filename=/a,,b,driver=qcow2,backing.driver=raw",
            id="chain-and-a-comma",
        ),
        pytest.param(
            [_layer("/a", "luks", encrypted=True)],
            ["s0"],
            "file.filename=/a,driver=luks,key-secret=s0",
            id="luks",
        ),
        pytest.param(
            [
                _layer("/a", "qcow2", encrypted=True),
                _layer("/b", "qcow2"),
                _layer("/c", "qcow2", encrypted=True),
            ],
            ["s0", "s1"],
            "file.filename=/a,driver=qcow2,encrypt.key-secret=s0,backing.driver=qcow2,"
            "backing.backing.driver=qcow2,backing.backing.encrypt.key-secret=s1",
            id="two-encrypted-of-three",
        ),
        pytest.param(
            [_layer("/a", "qcow2"), _layer(None, "nbd")],
            [],
            "file.filename=/a,driver=qcow2",
            id="over-what-is-no-file",
        ),
    ],
)
def test_every_layers_driver_is_said(
    layers: list[chain.Layer], secrets: list[str], options: str
) -> None:
    assert chain.image_options(layers, secrets) == options
