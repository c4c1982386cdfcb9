# SPDX-License-Identifier: Apache-2.0
"""QEMU from outside: its monitor, and handing a bitmap over to it."""
