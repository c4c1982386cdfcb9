# SPDX-License-Identifier: Apache-2.0
"""Tests mirror the packages; scenarios/ has what crosses them, vm/ a real guest."""
