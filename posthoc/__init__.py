# SPDX-License-Identifier: Apache-2.0
"""The command posthoc and the sessions that tie the other packages together."""
