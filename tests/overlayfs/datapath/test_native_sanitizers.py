# SPDX-License-Identifier: Apache-2.0
"""The sanitizers are awake: what they must find, committed on purpose, fails a test of ours."""

import threading

import pytest

from tests.overlayfs.datapath import conftest, native

Serve = conftest.Serve


def read_at_a_time(it: native.Native) -> None:
    """Read from several threads, so that several of the server's are at work."""

    def read() -> None:
        for _ in range(4):
            it.disk.read_bytes()

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("variant", "faults", "said"),
    [
        pytest.param("thread", "data-race", "data race", id="data-race"),
        pytest.param(
            "address", "overflow", "heap-buffer-overflow|insufficient space", id="overflow"
        ),
        pytest.param("address", "undefined", "signed integer overflow", id="undefined"),
    ],
)
def test_report_fails_a_test(serve: Serve, faults: str, said: str) -> None:
    """A server that a report has ended is replaced like any other: only the log tells, and it is looked at."""
    with pytest.raises(AssertionError, match=said):
        with serve(faults=faults) as it:
            read_at_a_time(it)
