# SPDX-License-Identifier: Apache-2.0
"""Finds the segments in which a live disk and its reference differ."""
