# SPDX-License-Identifier: Apache-2.0
"""nbdkit as a laboratory: a server that can be killed and started again, its log, and TLS material."""

import contextlib
import os
import pathlib
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from typing import NamedTuple

from tests import qemu, wait

Path = str | os.PathLike[str]


# nbdkit 1.32 asks for its parent's death as a SIGTERM, also where --exit-with-parent was not said, and for that
# its parent is the thread that made it (prctl(2)): a scan's thread ends before the other has read all.
_launcher = futures.ThreadPoolExecutor(1, thread_name_prefix="nbdkit")


# Seconds that a server has to end by itself.
_TO_END = 2.0


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


class Server:
    """nbdkit behind one socket's path; a context that begins with it running."""

    def __init__(self, folder: pathlib.Path, *arguments: Path) -> None:
        """`folder` has to be of a short name; `arguments` are nbdkit's, plugin and parameters."""
        self._socket = folder / "s"
        self.uri = qemu.uri(self._socket)
        self._process: subprocess.Popen[bytes] | None = None
        self.start(*arguments)

    def start(self, *arguments: Path) -> None:
        """Start it, also anew with other arguments; returns when it answers."""
        assert self._process is None
        self._socket.unlink(missing_ok=True)
        words = ["nbdkit", "-f", "-U", os.fspath(self._socket), *map(os.fspath, arguments)]
        process = self._process = _launcher.submit(_start, words).result()

        def answers() -> bool:
            assert process.poll() is None, f"{words} ended with {process.returncode}"
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(wait.DEADLINE)
                return (
                    client.connect_ex(os.fspath(self._socket)) == 0
                    and client.recv(8) == b"NBDMAGIC"
                )

        wait.until(answers, f"{words} answers")

    def kill(self) -> None:
        """End it at once, with whatever it was about to answer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        # Asked first, so that it takes its scripts from /tmp; what it is answering may take for ever.
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_TO_END)
        self.kill()


@contextlib.contextmanager
def over_tcp(*arguments: Path) -> Iterator[int]:
    """Serve on the loopback interface by nbdkit and yield the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        # nbdkit takes the listener from us (socket activation): nobody else can get the port in between.
        take_over = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
            "os.execvp(sys.argv[2], sys.argv[2:])"
        )
        process = subprocess.Popen(
            [
                *[sys.executable, "-c", take_over, str(listener.fileno())],
                *["nbdkit", "-f", *map(os.fspath, arguments)],
            ],
            env={**os.environ, "LISTEN_FDS": "1"},
            pass_fds=[listener.fileno()],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port: int = listener.getsockname()[1]
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def psk_file(folder: pathlib.Path, user: str = "alice") -> pathlib.Path:
    """Make a file with a pre-shared key for `user`, as psktool writes it."""
    path = folder / "keys.psk"
    path.write_text(f"{user}:{secrets.token_hex(32)}\n")
    return path


def certificates(folder: pathlib.Path) -> pathlib.Path:
    """Make a folder with an authority and certificates of a server "localhost" and a client."""
    folder.mkdir()
    _key(folder, "ca")
    (folder / "ca.template").write_text('cn="authority"\nca\ncert_signing_key\n')
    _certtool(folder, "ca", "--generate-self-signed", "--load-privkey", "ca-key.pem")
    for name, purpose in (
        ("server", 'cn="localhost"\ndns_name="localhost"\ntls_www_server\n'),
        ("client", 'cn="client"\ntls_www_client\n'),
    ):
        _key(folder, name)
        (folder / f"{name}.template").write_text(f"{purpose}encryption_key\nsigning_key\n")
        authority = ("--load-ca-certificate", "ca-cert.pem", "--load-ca-privkey", "ca-key.pem")
        key = ("--load-privkey", f"{name}-key.pem")
        _certtool(folder, name, "--generate-certificate", *authority, *key)
    return folder


def _key(folder: pathlib.Path, name: str) -> None:
    # Elliptic curves: made at once, where an RSA key takes its time on a busy machine.
    words = ["certtool", "--generate-privkey", "--key-type=ecdsa", "--outfile", f"{name}-key.pem"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)


def _certtool(folder: pathlib.Path, name: str, *arguments: str) -> None:
    words = ["certtool", *arguments, "--template", f"{name}.template"]
    words += ["--outfile", f"{name}-cert.pem"]
    subprocess.run(words, cwd=folder, check=True, capture_output=True)


class Request(NamedTuple):
    """A request as nbdkit's log filter has written it down; `holes`: zeros that may be holes."""

    name: str
    start: int
    length: int
    holes: bool


def requests(log: pathlib.Path, *names: str) -> list[Request]:
    """Return the requests of `names` (Read, Write, Zero, Trim) in the file `log` (logfile=)."""
    found = []
    pattern = r" (\w+) id=\d+ offset=(0x[0-9a-f]+) count=(0x[0-9a-f]+)(?: trim=([01]))?"
    for name, start, length, trim in re.findall(pattern, log.read_text()):
        if name in names:
            found.append(Request(name, int(start, 16), int(length, 16), trim == "1"))
    return found
