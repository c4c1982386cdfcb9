# SPDX-License-Identifier: Apache-2.0
"""What every test may ask for, and what holds for all of them.

- A test leaves nothing mounted beneath its folder.
- A test during which our packages log a warning asks for `caplog`, and looks.
- Where CI=true nothing is missing, so that a skip is a failure.
- Property tests take the same examples in every run.
"""

import logging
import os
import pathlib
import subprocess
from collections.abc import Generator, Iterator

import hypothesis
import pytest

# The same examples everywhere and no deadline on a busy machine: a property test that fails in CI
# fails here too.
hypothesis.settings.register_profile(
    "posthoc",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("posthoc")

OURS = {"dirtymap", "scanner", "overlayfs", "posthoc"}
IN_CI = os.environ.get("CI") == "true"


@pytest.fixture(params=["python", "native"])
def datapath(request: pytest.FixtureRequest) -> str:
    """Every form of the disk's data path, as `posthoc mount --datapath` calls it."""
    name: str = request.param
    return name


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder on a real disk's file system, for O_DIRECT, holes and write-back as a user has them.

    pytest's folder where that is one; else (tmpfs) the test is told to set --basetemp.
    """
    kind = subprocess.run(
        ["stat", "--file-system", "--format=%T", str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    if kind in ("tmpfs", "ramfs"):
        pytest.skip(f"{tmp_path} is on {kind}: run with --basetemp on a disk's file system")
    return tmp_path


@pytest.fixture
def mountpoint(tmp_path: pathlib.Path) -> pathlib.Path:
    """An empty folder to mount on."""
    folder = tmp_path / "mnt"
    folder.mkdir()
    return folder


def mounts_beneath(folder: pathlib.Path) -> list[str]:
    """Return the mountpoints in or below `folder`, deepest first; a dead mount counts too."""
    lines = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    # The kernel writes a blank in a path as \040.
    points = (line.split()[4].encode().decode("unicode_escape") for line in lines)
    return sorted((p for p in points if pathlib.Path(p).is_relative_to(folder)), reverse=True)


@pytest.fixture(autouse=True)
def _nothing_stays_mounted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the test that leaves a mount; set up first, hence looked at last."""
    if "tmp_path" not in request.fixturenames:
        yield
        return
    folder: pathlib.Path = request.getfixturevalue("tmp_path")
    yield
    left = mounts_beneath(folder)
    for point in left:
        subprocess.run(["umount", "--lazy", point], check=False)
    assert not left, f"still mounted after the test: {left}"


class _Warnings(logging.Handler):
    """Collects what our packages log at warning or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.partition(".")[0] in OURS:
            self.lines.append(f"{record.name}: {record.getMessage()}")


@pytest.fixture(autouse=True)
def _warnings_are_announced(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test with a warning that it does not look for."""
    handler = _Warnings()
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
    if "caplog" not in request.fixturenames:
        assert not handler.lines, "logged, and not announced by asking for caplog"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A skip in CI is a failure that gives the skip's reason."""
    report = yield
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped in CI: {report.longrepr}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """The same for a module that skips itself."""
    report = yield
    if IN_CI and report.outcome == "skipped":
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} was skipped in CI: {report.longrepr}"
    return report
