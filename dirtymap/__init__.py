# SPDX-License-Identifier: Apache-2.0
"""The map: bits, extents, images, formats. Knows no FUSE, no QEMU process, no command line."""
