# SPDX-License-Identifier: Apache-2.0
"""The house's rules, read from the sources: which package may import what, and how large a file is."""

import ast
import pathlib
import re
import subprocess
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Package -> what of ours it may import. Arrows go one way.
ARROWS = {
    "dirtymap": set[str](),
    "scanner": {"dirtymap"},
    "overlayfs": {"dirtymap"},
    "posthoc": {"dirtymap", "scanner", "overlayfs"},
}

# Library -> the only files (or folders) that import it.
ONLY_IN = {
    "nbd": ["dirtymap/images/nbd.py"],
    "pyfuse3": ["overlayfs"],
    "rich": ["posthoc"],
    "argparse": ["posthoc"],
}

# A file this long has a second idea in it.
LONGEST_FILE = 450

SPDX = "# SPDX-License-Identifier: Apache-2.0\n"
SHELLS = ("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput")

SOURCES = sorted(
    path.relative_to(ROOT) for package in ARROWS for path in (ROOT / package).rglob("*.py")
)
SCRIPTS = sorted(
    path.relative_to(ROOT)
    for folder in ("tests", "scripts")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"  # in tests/ they only make a folder a package
)


def tree(path: pathlib.Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imports(path: pathlib.Path) -> Iterator[str]:
    """Yield the full name of every module that a file imports, wherever in it."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides the owner"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_arrows_between_packages_go_one_way() -> None:
    """A package imports only those below it; nothing imports the tests or a script."""
    ours = set(ARROWS) | {"tests", "scripts"}
    wrong = [
        f"{path} imports {name}"
        for path in SOURCES
        for name in sorted(imports(path))
        if name.split(".")[0] in ours - ARROWS[path.parts[0]] - {path.parts[0]}
    ]
    assert wrong == []


@pytest.mark.parametrize(("library", "places"), ONLY_IN.items(), ids=ONLY_IN)
def test_library_is_used_in_its_place_only(library: str, places: list[str]) -> None:
    """What is hard to install or to test is behind one module."""
    users = [
        str(path)
        for path in SOURCES
        if library in {name.split(".")[0] for name in imports(path)}
        and not any(path.is_relative_to(place) for place in places)
    ]
    assert users == []


def test_every_module_has_its_licence_and_says_what_it_is_for() -> None:
    """One SPDX line (the second after a #!), then a docstring."""
    wrong = [
        str(path)
        for path in SOURCES + SCRIPTS
        if SPDX not in "".join((ROOT / path).read_text().splitlines(True)[:2])
        or not ast.get_docstring(tree(path))
    ]
    assert wrong == []


def test_no_module_is_a_book() -> None:
    """A file has one idea."""
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in SOURCES}
    assert {path: length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_no_shell_stands_before_a_command() -> None:
    """External commands are lists: a file name is never read as a shell's."""
    calls = [
        f"{path}: {ast.unparse(node)}"
        for path in SOURCES + SCRIPTS
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call)
        if ast.unparse(node.func) in SHELLS or any(word.arg == "shell" for word in node.keywords)
    ]
    assert calls == []


def test_every_folder_of_the_packages_is_one_and_is_known_to_the_build() -> None:
    """meson.build names each folder, so that no __pycache__ of it is installed."""
    text = (ROOT / "meson.build").read_text()
    table = re.search(r"^packages = \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert table is not None
    named = {
        str(pathlib.PurePath(package, folder))
        for package, folders in re.findall(r"'(\w+)': \[(.*?)\]", table[1])
        for folder in ["", *re.findall(r"'([^']+)'", folders)]
    }
    assert named == {str(path.parent) for path in SOURCES}
    assert all((ROOT / folder / "__init__.py").exists() for folder in named)


@pytest.mark.parametrize("name", ["scripts/setup", "scripts/test", "scripts/demo", ".ci/run"])
def test_script_is_runnable_and_parses(name: str) -> None:
    """What the README names can be started."""
    path = ROOT / name
    assert path.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(path)], check=True)
