# SPDX-License-Identifier: Apache-2.0
"""The FUSE mount: serves the live disk as a file and records what is written to it."""
