# SPDX-License-Identifier: Apache-2.0
"""qcow2 files that hold dirty maps: `format` for the bytes, `carrier` for the files."""
