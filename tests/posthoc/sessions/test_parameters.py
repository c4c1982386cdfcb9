# SPDX-License-Identifier: Apache-2.0
"""A session's parameters can be stored and read again."""

import json

from dirtymap import images
from posthoc.sessions import parameters


def test_what_is_stored_is_restored() -> None:
    given = parameters.Parameters(
        live="/a", reference="qcow2:/b", mountpoint="/m", options=images.Options(secrets=("/s",))
    )
    stored = json.loads(json.dumps(given.stored()))
    assert parameters.Parameters.restored(stored) == given
