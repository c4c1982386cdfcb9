# SPDX-License-Identifier: Apache-2.0
"""What is found out of a libvirt domain beside virsh."""

import contextlib
import subprocess
import sys
import uuid
from collections.abc import Iterator

from posthoc.qemu import virsh


@contextlib.contextmanager
def waiting(*words: str) -> Iterator[int]:
    """Run a process with `words` on its command line and yield its id."""
    said = "print(flush=True); input()"
    command = [sys.executable, "-c", said, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process.pid
        process.communicate(b"\n")


def test_process_of_a_domain_is_the_one_with_its_uuid() -> None:
    """A posthoc that was told the domain by its uuid is not taken for the domain's QEMU."""
    domain = str(uuid.uuid4())
    assert virsh._process_of(domain) is None
    with waiting("attach", "--domain", domain), waiting("-uuid", domain) as pid:
        found = virsh._process_of(domain)
        assert found is not None
        assert found[0].pid == pid
