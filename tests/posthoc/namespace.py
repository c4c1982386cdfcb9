# SPDX-License-Identifier: Apache-2.0
"""What other users meet, each scenario in a mount namespace of its own: `python -m ... SCENARIO FOLDER`, as root.

What they need is bound in there only: a /dev/fuse that everybody may open, a /run/user, a /etc/fuse.conf. The
machine's own stay what they are, and no other test meets a mount whose name is no UTF-8.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping

from tests import command, qemu, wait
from tests.posthoc.images import SEGMENT

NOBODY = 65534
USER = [
    shutil.which("setpriv") or "setpriv",
    f"--reuid={NOBODY}",
    f"--regid={NOBODY}",
    "--clear-groups",
]


class Scene:
    """A folder of the user's with a live disk, a reference and a mountpoint."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.live, self.reference = folder / "live.raw", folder / "reference.raw"
        self.mountpoint, self.map = folder / "mnt", folder / "map.qcow2"
        self.pair = (self.live, self.reference, self.mountpoint)

    def prepare(self) -> None:
        """Bind what the user needs."""
        node = self.folder / "fuse"
        os.mknod(node, stat.S_IFCHR | 0o666, os.stat("/dev/fuse").st_rdev)
        node.chmod(0o666)
        subprocess.run(["mount", "--bind", node, "/dev/fuse"], check=True)
        (self.folder / "fuse.conf").touch()
        subprocess.run(["mount", "--bind", self.folder / "fuse.conf", "/etc/fuse.conf"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "none", "/run/user"], check=True)
        for own in (pathlib.Path(f"/run/user/{NOBODY}"), self.folder / "run"):
            own.mkdir(mode=0o700)
            os.chown(own, NOBODY, NOBODY)

    def user(
        self, *words: str | pathlib.Path, status: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as the user."""
        environment = command.environment(env)
        if "XDG_RUNTIME_DIR" not in (env or {}):
            environment.pop("XDG_RUNTIME_DIR", None)
        done = subprocess.run(
            [*USER, *words],
            env=environment,
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=command.TIMEOUT,
        )
        assert done.returncode == status, (words, done)
        return done

    def posthoc(
        self, *words: str | pathlib.Path, status: int = 0, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run the command as the user."""
        return self.user(*command.words(*words), status=status, env=env)

    @contextlib.contextmanager
    def mounted(
        self, *options: str | pathlib.Path, env: Mapping[str, str] | None = None
    ) -> Iterator[None]:
        """Mount as the user; nothing is mounted when the block has ended."""
        self.posthoc("mount", *options, *self.pair, env=env)
        try:
            yield
        finally:
            while command.is_mounted(self.mountpoint):
                subprocess.run(["umount", "--lazy", self.mountpoint], check=False)

    def write(self, segment: int, status: int = 0) -> None:
        """Write a byte through the mount as the user."""
        disk = f"of={self.mountpoint / 'disk'}"
        self.user(
            "dd",
            "if=/dev/zero",
            disk,
            "bs=1",
            "count=1",
            f"seek={segment * SEGMENT}",
            "conv=notrunc",
            status=status,
        )

    def pid(self) -> int:
        """Return the session that answers."""
        return int(json.loads(self.user("cat", self.mountpoint / "status.json").stdout)["pid"])

    def dirty(self) -> set[int]:
        return qemu.dirty_segments(self.map, SEGMENT)


def session(scene: Scene) -> None:
    """A user mounts, writes, waits and unmounts, with nothing of root's."""
    with scene.mounted("--output", scene.map):
        scene.posthoc("wait", scene.mountpoint)
        assert scene.dirty() == {3}
        scene.write(7)
        assert "written: 65536" in scene.user("cat", scene.mountpoint / "status").stdout
        scene.posthoc("umount", scene.mountpoint)
    assert scene.dirty() == {3, 7}
    assert scene.map.stat().st_uid == NOBODY


def killed_session(scene: Scene) -> None:
    """A user's session that is killed is replaced by another of the user's, and nothing is lost."""
    with scene.mounted("--datapath", "native", "--output", scene.map):
        scene.posthoc("wait", scene.mountpoint)
        scene.write(7)
        for segment in (9, 11):
            dead = scene.pid()
            os.kill(dead, signal.SIGKILL)
            scene.write(segment)
            assert scene.pid() != dead
            assert os.stat(f"/proc/{scene.pid()}").st_uid == NOBODY
        scene.posthoc("wait", scene.mountpoint)
        scene.posthoc("umount", scene.mountpoint)
    assert scene.dirty() == {3, 7, 9, 11}


def read_only(scene: Scene) -> None:
    """A disk that the user may only read."""
    os.chown(scene.live, 0, 0)
    scene.live.chmod(0o444)
    assert "cannot be opened" in scene.posthoc("mount", *scene.pair, status=2).stderr
    with scene.mounted("--read-only", "--output", scene.map):
        scene.posthoc("wait", scene.mountpoint)
        scene.write(7, status=1)
        scene.posthoc("umount", scene.mountpoint)
    assert scene.dirty() == {3}


def root_unmounts(scene: Scene) -> None:
    """Root was told that the session had died and the map was lost, of a session that was writing it."""
    with scene.mounted("--output", scene.map):
        scene.posthoc("wait", scene.mountpoint)
        scene.write(7)
        assert command.posthoc("umount", scene.mountpoint).stderr == ""
    assert scene.dirty() == {3, 7}


def another_environment(scene: Scene) -> None:
    """A job without the variable finds the session; one that was hidden by it is not called dead."""
    runtime = {"XDG_RUNTIME_DIR": str(scene.folder / "run")}
    with scene.mounted("--output", scene.map):
        scene.posthoc("wait", scene.mountpoint)
        scene.posthoc("umount", scene.mountpoint, env=runtime)
    assert scene.dirty() == {3}
    scene.map.unlink()
    with scene.mounted("--output", scene.map, env=runtime):
        told = scene.posthoc("umount", scene.mountpoint, status=2).stderr
        assert f"of user {NOBODY}" in told
        assert "is not known" in told
        assert "lost" not in told
    wait.until(scene.map.exists, "the session has written its map")


def allow_other_is_not_allowed(scene: Scene) -> None:
    """fusermount3 would refuse it in words of its own."""
    told = scene.posthoc("mount", "--allow-other", *scene.pair, status=2).stderr
    assert "--allow-other needs the line user_allow_other in /etc/fuse.conf" in told
    (scene.folder / "fuse.conf").write_text("user_allow_other\n")
    with scene.mounted("--allow-other"):
        assert (scene.mountpoint / "disk").stat().st_uid == NOBODY
        scene.posthoc("umount", scene.mountpoint)


def no_fusermount(scene: Scene) -> None:
    told = scene.posthoc(
        "mount", *scene.pair, status=2, env={"PATH": str(scene.folder / "run")}
    ).stderr
    assert told == "posthoc: fusermount3 is missing: install fuse3, or mount as root\n"


def no_room(scene: Scene) -> None:
    """The folder of sessions is full: at the end it had no word left for `umount`, who told that the map was lost."""
    run = pathlib.Path(f"/run/user/{NOBODY}")
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size=1M,mode=700,uid={NOBODY}", "none", run], check=True
    )
    with scene.mounted("--output", scene.map):
        with open(run / "much", "wb", buffering=0) as file:
            while os.statvfs(run).f_bavail:
                file.write(bytes(4096))
        scene.posthoc("wait", scene.mountpoint)
        scene.write(7)
        assert scene.posthoc("umount", scene.mountpoint).stderr == ""
    assert scene.dirty() == {3, 7}
    with open(run / "more", "wb", buffering=0) as file:
        while os.statvfs(run).f_bavail:
            file.write(bytes(4096))
    told = scene.posthoc("mount", *scene.pair, status=2).stderr
    assert "finds no room: No space left on device" in told
    assert len(told.splitlines()) == 1
    assert not command.is_mounted(scene.mountpoint)
    assert [file for file in (run / "posthoc").glob("*/*") if file.name != "lock"] == []


def name_that_is_no_utf8(scene: Scene) -> None:
    """A holder, or a refusal of umount's, of such a name ended umount with a traceback."""
    scene.mountpoint = scene.folder / os.fsdecode(b"m\xff\n\x85nt")
    scene.mountpoint.mkdir()
    # Its own name is no UTF-8 either.
    hold = (
        "import sys; open('/proc/self/comm', 'wb').write(b'h\\xff')\n"
        "held = open(sys.argv[1]); print('held', flush=True); sys.stdin.read()"
    )
    command.posthoc("mount", scene.live, scene.reference, scene.mountpoint)
    with subprocess.Popen(
        [sys.executable, "-c", hold, scene.mountpoint / "disk"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        told = command.posthoc("umount", scene.mountpoint, status=2).stderr
        assert f"(pid {holder.pid})" in told
        assert len(told.splitlines()) == 1
        holder.communicate()
    with qemu.loop_device(scene.mountpoint / "disk") as device:
        told = command.posthoc("umount", scene.mountpoint, status=2).stderr
        assert f"is in use by {device}:" in told
    assert "complete" in command.posthoc("wait", "--json", scene.mountpoint).stdout
    command.posthoc("umount", scene.mountpoint)


SCENARIOS = (
    session,
    killed_session,
    read_only,
    root_unmounts,
    another_environment,
    allow_other_is_not_allowed,
    no_fusermount,
    no_room,
    name_that_is_no_utf8,
)


def main() -> None:
    name, folder = sys.argv[1:]
    scene = Scene(pathlib.Path(folder))
    scene.prepare()
    {scenario.__name__: scenario for scenario in SCENARIOS}[name](scene)
    print("done")


if __name__ == "__main__":
    main()
