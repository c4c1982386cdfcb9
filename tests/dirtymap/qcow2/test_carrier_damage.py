# SPDX-License-Identifier: Apache-2.0
"""Files that are no map, or a broken one: a Bitmap or one clear line, never another exception."""

import os
import pathlib
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dirtymap import bitmap, errors
from dirtymap.qcow2 import carrier
from dirtymap.qcow2 import layout as layouts
from tests.dirtymap.qcow2 import parts

# Everything that is not bits, and the beginning of those.
METADATA = 6 * layouts.CLUSTER + 64

# Where the fields are: damage elsewhere meets zeros.
FIELDS = [
    *range(144),
    *range(parts.DIRECTORY, parts.DIRECTORY + 40),
    *range(parts.TABLE, parts.TABLE + 24),
]


def readable(path: pathlib.Path) -> bitmap.Bitmap | None:
    """The bitmap, or None where a MapError says why not; anything else is a defect."""
    try:
        found = carrier.read(path)
        carrier.names(path)
    except errors.MapError as error:
        line = str(error)
    else:
        return found
    assert "\n" not in line
    return None


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A valid carrier's bytes."""
    return parts.made(tmp_path_factory.mktemp("damage") / "carrier.qcow2").read_bytes()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("damage") / "damaged.qcow2"


@given(
    changes=st.lists(
        st.tuples(st.sampled_from(FIELDS) | st.integers(0, METADATA), st.integers(0, 255)),
        min_size=1,
        max_size=8,
    )
)
@example(changes=[(24, 255)])
@example(changes=[(parts.DIRECTORY + 18, 255)])
@settings(max_examples=400)
def test_changed_bytes_give_a_bitmap_or_one_line(
    whole: bytes, scratch: pathlib.Path, changes: list[tuple[int, int]]
) -> None:
    damaged = bytearray(whole)
    for place, value in changes:
        damaged[place] = value
    scratch.write_bytes(damaged)
    readable(scratch)


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0x80, 0xFF])
def test_every_byte_of_every_field_may_be_anything(
    whole: bytes, scratch: pathlib.Path, value: int
) -> None:
    """Each byte alone; memory stays what the format allows a file of this length."""
    tracemalloc.start()
    try:
        for place in FIELDS:
            scratch.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            tracemalloc.reset_peak()
            readable(scratch)
            assert tracemalloc.get_traced_memory()[1] < 16 << 20, place
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "length",
    [0, 1, 3, 4, 71, 103, 104, 143, 65536, 3 * 65536, 3 * 65536 + 20, 5 * 65536, 7 * 65536 + 99],
)
def test_a_file_cut_off_is_refused(whole: bytes, scratch: pathlib.Path, length: int) -> None:
    scratch.write_bytes(whole[:length])
    assert readable(scratch) is None


def test_a_file_cut_off_in_its_last_bits_is_refused(whole: bytes, scratch: pathlib.Path) -> None:
    scratch.write_bytes(whole[:-1])
    with pytest.raises(errors.MapError, match="cut off"):
        carrier.read(scratch)


@given(data=st.binary(max_size=300))
def test_any_bytes_behind_the_magic_are_refused(scratch: pathlib.Path, data: bytes) -> None:
    scratch.write_bytes(b"QFI\xfb" + data)
    assert readable(scratch) is None


def test_a_name_that_is_no_text_is_shown_and_harmless(scratch: pathlib.Path) -> None:
    parts.made(scratch)
    parts.put(scratch, parts.DIRECTORY + 24, b"\xff\n\x1b")
    (found,) = carrier.names(scratch)
    assert found.name.startswith("\\xff")
    with pytest.raises(errors.MapError) as caught:
        carrier.read(scratch, "other")
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_two_bitmaps_of_one_name_are_damage(scratch: pathlib.Path) -> None:
    parts.made(scratch)
    entry = scratch.read_bytes()[parts.DIRECTORY : parts.DIRECTORY + 32]
    parts.put(scratch, parts.DIRECTORY + 32, entry)
    parts.change_extension(scratch, nb_bitmaps=2, bitmap_directory_size=64)
    with pytest.raises(errors.MapError, match="two bitmaps 'posthoc'"):
        carrier.read(scratch)


def test_what_is_marked_corrupt_is_refused(scratch: pathlib.Path) -> None:
    parts.made(scratch)
    parts.change_header(scratch, incompatible_features=2)
    with pytest.raises(errors.MapError, match="corrupt"):
        carrier.read(scratch)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "socketless", "text", "zero-byte"])
def test_what_is_no_map_at_all_is_one_line(tmp_path: pathlib.Path, kind: str) -> None:
    """A pipe without a writer is refused at once, not waited for."""
    path: str | pathlib.Path = tmp_path / "x"
    if kind == "folder":
        (tmp_path / "x").mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "socketless":
        path = "/dev/null"
    elif kind == "text":
        (tmp_path / "x").write_text("qemu-img: a map this is not\n")
    elif kind == "zero-byte":
        path = "a\0b"
    for call in (carrier.read, carrier.names):
        with pytest.raises(errors.MapError) as caught:
            call(path)
        assert "\n" not in str(caught.value)
