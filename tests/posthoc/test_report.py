# SPDX-License-Identifier: Apache-2.0
"""The status as text for people and as JSON for programs."""

import json

import pytest

from posthoc import report

FACTS = {
    "state": "scanning",
    "live": "/vm/disk.raw",
    "size": 1 << 30,
    "granularity": 65536,
    "scanned": 1 << 29,
    "dirty": 1 << 28,
    "rate": 1048576.4,
    "eta": 125.2,
    "errors": 1,
    "error_list": ["live 512 bytes at 0 (Input/output error)"],
    "savings": {"zeros": 4096, "written": 0},
    "output": None,
    "guest": {"reads": {"operations": 0, "bytes": 0, "errors": 0}},
}

TEXT = """\
state: scanning
live: /vm/disk.raw
size: 1073741824 (1.0 GiB)
granularity: 65536 (64.0 KiB)
scanned: 536870912 (512.0 MiB), 50.0 %
dirty: 268435456 (256.0 MiB), at most: the scan is not complete
rate: 1048576 (1.0 MiB) per second
eta: 2 min 5 s
errors: 1; live 512 bytes at 0 (Input/output error)
savings: zeros 4096 (4.0 KiB)
"""


def test_text_has_bytes_first_and_a_human_form_behind() -> None:
    assert report.as_text(FACTS) == TEXT


def test_json_has_the_same_names_with_numbers() -> None:
    assert json.loads(report.as_json(FACTS)) == FACTS


def test_a_complete_scan_gives_no_bound_and_nothing_left_to_wait_for() -> None:
    text = report.as_text({**FACTS, "state": "complete", "eta": None})
    assert "dirty: 268435456 (256.0 MiB)\n" in text
    assert "eta: -\n" in text


def test_a_name_with_a_newline_stays_one_line() -> None:
    text = report.as_text({"state": "paused", "live": "/vm/a\nstate: complete"})
    assert text == "state: paused\nlive: /vm/a\\nstate: complete\n"


@pytest.mark.parametrize(
    ("part", "text"), [(0, "0.0 %"), (999_999, "99.9 %"), (1_000_000, "100.0 %")]
)
def test_per_cent_is_not_rounded_up_to_all(part: int, text: str) -> None:
    assert report.percent(part, 1_000_000) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text
