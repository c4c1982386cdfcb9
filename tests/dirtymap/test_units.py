# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write and read them."""

import pytest

from dirtymap import errors, units


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("1M", 1 << 20),
        ("1MiB", 1 << 20),
        ("3GB", 3 << 30),
        (" 2T ", 2 << 40),
        ("7E", 7 << 60),
    ],
)
def test_a_size_is_bytes_or_a_power_of_1024(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.5G", "1 K", "64KK", "0x10", "٣", "8E", "9" * 30]
)
def test_what_is_no_size_is_one_line(text: str) -> None:
    with pytest.raises(errors.UserError) as caught:
        units.parse_size(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1 << 20, "1.0 MiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (3 << 39, "1.5 TiB"),
        (5 << 70, "5120.0 EiB"),
    ],
)
def test_a_size_for_people(size: int, text: str) -> None:
    assert units.human(size) == text


def test_a_described_size_has_the_bytes_first() -> None:
    assert units.describe(65536) == "65536 (64.0 KiB)"


@pytest.mark.parametrize("granularity", [512, 65536, 2 << 20])
def test_powers_of_two_are_granularities(granularity: int) -> None:
    assert units.check_granularity(granularity) == granularity


@pytest.mark.parametrize("granularity", [0, 1, 256, 513, 65535, 4 << 20, -512])
def test_other_granularities_are_refused(granularity: int) -> None:
    with pytest.raises(errors.UserError):
        units.check_granularity(granularity)
