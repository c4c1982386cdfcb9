# SPDX-License-Identifier: Apache-2.0
"""The control file's commands: all of one write are obeyed, or none."""

import pytest

from dirtymap import errors
from posthoc.sessions import control


class Told:
    """A scan that notes what it is told."""

    def __init__(self) -> None:
        self.commands: list[object] = []

    def pause(self) -> None:
        self.commands.append("pause")

    def resume(self) -> None:
        self.commands.append("resume")

    def cancel(self) -> None:
        self.commands.append("cancel")

    def rescan(self) -> None:
        self.commands.append("rescan")

    def set_rate(self, rate: int | None) -> None:
        self.commands.append(rate)

    def set_workers(self, workers: int) -> None:
        self.commands.append(workers)

    def set_pacing(self, on: bool) -> None:
        self.commands.append(on)


def test_every_line_is_obeyed_in_its_order() -> None:
    told = Told()
    control.obey(
        told,
        "pause\n\n  rate 2M \nrate none\nworkers 3\npacing on\npacing off\ncancel\nrescan\nresume",
    )
    assert told.commands == [
        *("pause", 2 << 20, None, 3, True, False),
        *("cancel", "rescan", "resume"),
    ]


@pytest.mark.parametrize("wrong", ["bad", "rate 0", "workers 65", "pacing", "pause now"])
@pytest.mark.parametrize("text", ["pause\n{}\nresume\n", "{}\npause\n", "pause\nresume\n{}"])
def test_a_write_with_a_wrong_line_does_nothing(text: str, wrong: str) -> None:
    """It was refused with EINVAL, and the lines before the wrong one had been carried out."""
    told = Told()
    with pytest.raises(errors.UserError):
        control.obey(told, text.format(wrong))
    assert told.commands == []
