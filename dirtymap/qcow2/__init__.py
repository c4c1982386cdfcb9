# SPDX-License-Identifier: Apache-2.0
"""qcow2's structures, and the carrier: a qcow2 file that holds one dirty bitmap."""
