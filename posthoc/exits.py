# SPDX-License-Identifier: Apache-2.0
"""Exit codes of the command."""

DONE = 0  # done; for diff: identical; for verify: nothing missed
DIFFERS = 1  # diff and verify: they differ
MISTAKE = 2  # the user's mistake or the environment
READ_ERROR = 3  # an I/O error, with a result that is still valid
BUG = 4  # a bug of posthoc's
SIGNALLED = 128  # and the signal's number, as shells have it
INTERRUPTED = 130  # by Ctrl-C
