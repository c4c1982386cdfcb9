# SPDX-License-Identifier: Apache-2.0
"""What runs for as long as a disk is mounted, compared or attached."""
