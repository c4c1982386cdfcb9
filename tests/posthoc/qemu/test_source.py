# SPDX-License-Identifier: Apache-2.0
"""Where the reader of a running QEMU's disk connects to."""

from typing import cast

import pytest

from posthoc.qemu import attachment, source


@pytest.mark.parametrize(
    ("running", "uri"),
    [
        (None, "nbd+unix:///e?socket=/run/own"),
        ("/run/theirs", "nbd+unix:///e?socket=/run/theirs"),
        ("192.0.2.1:10809", "nbd://192.0.2.1:10809/e"),
        ("[2001:db8::1]:10809", "nbd://[2001:db8::1]:10809/e"),
    ],
    ids=["own", "unix", "tcp", "tcp-6"],
)
def test_address_of_an_export(running: str | None, uri: str) -> None:
    """A server of posthoc's own, or one that runs: a socket's path, or HOST:PORT."""
    qemu = cast("attachment.Attachment", None)
    assert source.Source(qemu, "/run/own", running)._uri("e") == uri
