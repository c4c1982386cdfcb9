# SPDX-License-Identifier: Apache-2.0
"""The disk's own reads and writes, in one of several ways behind one interface."""
