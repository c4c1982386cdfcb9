# SPDX-License-Identifier: Apache-2.0
"""A real guest on a disk of ours: a Debian kernel, busybox, and a shell script that says what it does.

    packages.py    a kernel and busybox, from the distribution's packages
    initramfs.py   the guest's root: an archive in memory
    guest.py       QEMU with both and one disk; its serial console is the log

`python -m tests.vm fetch` downloads what is missing; `python -m tests.vm boot DISK SCRIPT` runs one,
under KVM where a guest is seen to start and end under it.
"""
