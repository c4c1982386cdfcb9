# SPDX-License-Identifier: Apache-2.0
"""fallocate(2) as it is packed for pyfuse3: what is taken, and the errno of what is not."""

import errno

import pytest

from overlayfs import allocation
from overlayfs.allocation import KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE

SIZE = 100_000
PUNCH = PUNCH_HOLE | KEEP_SIZE


def packed(mode: int, start: int, length: int) -> bytes:
    return allocation.VALUE.pack(mode, start, length)


@pytest.mark.parametrize(
    ("mode", "start", "length", "expected"),
    [
        pytest.param(PUNCH, 5, 10, allocation.Change(5, 10, True), id="punch"),
        pytest.param(
            ZERO_RANGE | KEEP_SIZE, 0, SIZE, allocation.Change(0, SIZE, False), id="zero-all"
        ),
        pytest.param(ZERO_RANGE, 7, 8, allocation.Change(7, 8, False), id="zero-as-qemu-does"),
        pytest.param(
            PUNCH, SIZE - 1, 10, allocation.Change(SIZE - 1, 1, True), id="across-the-end"
        ),
        pytest.param(
            PUNCH, 0, (1 << 63) - 1, allocation.Change(0, SIZE, True), id="as-long-as-can-be"
        ),
    ],
)
def test_taken(mode: int, start: int, length: int, expected: allocation.Change) -> None:
    assert allocation.change(packed(mode, start, length), SIZE) == expected


@pytest.mark.parametrize(
    ("value", "number"),
    [
        pytest.param(packed(0, 0, 1), errno.EOPNOTSUPP, id="allocation"),
        pytest.param(packed(PUNCH_HOLE, 0, 1), errno.EOPNOTSUPP, id="punch-that-sets-the-size"),
        pytest.param(packed(PUNCH | ZERO_RANGE, 0, 1), errno.EOPNOTSUPP, id="both"),
        pytest.param(packed(8, 0, 1), errno.EOPNOTSUPP, id="collapse"),
        pytest.param(packed(ZERO_RANGE, 1, SIZE), errno.EFBIG, id="growing"),
        pytest.param(packed(PUNCH, SIZE, 1), errno.EINVAL, id="beyond-the-end"),
        pytest.param(packed(PUNCH, 0, 0), errno.EINVAL, id="nothing"),
        pytest.param(b"", errno.EINVAL, id="no-value"),
        pytest.param(packed(PUNCH, 0, 1) + b"x", errno.EINVAL, id="too-long-a-value"),
    ],
)
def test_refused(value: bytes, number: int) -> None:
    with pytest.raises(OSError) as error:
        allocation.change(value, SIZE)
    assert error.value.errno == number
