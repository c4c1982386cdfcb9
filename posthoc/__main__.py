# SPDX-License-Identifier: Apache-2.0
"""`python -m posthoc` is the command."""

import sys

from posthoc import cli

sys.exit(cli.main())
