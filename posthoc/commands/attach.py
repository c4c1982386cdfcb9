# SPDX-License-Identifier: Apache-2.0
"""posthoc attach: the difference into a dirty bitmap of a running QEMU."""

from __future__ import annotations

import argparse
import logging
import re
import signal
import sys
from typing import Any

import trio

from dirtymap import errors
from posthoc import bar, exits, report
from posthoc.commands import options, reading
from posthoc.qemu import qmp, virsh
from posthoc.sessions import attached, examined, offline
from scanner import progress

log = logging.getLogger(__name__)

_DESCRIPTION = """\
Find in what a running VM's disk differs from REFERENCE, while it is written, and leave the result as a
dirty bitmap of QEMU that goes on recording: the next backup can be an incremental one. The VM is neither
stopped nor restarted. Whatever else QEMU is told for this is taken back, also when it fails.
"""

_EPILOG = """\
examples:
  posthoc attach --qmp /run/vm.qmp --node disk0 --bitmap backup0 qcow2:/backup/full.qcow2
  posthoc attach --qmp /run/vm.qmp --disk disk0=/backup/a.raw:backup0 --disk disk1=/backup/b.raw:backup0
  posthoc attach --domain vm1 --target vda --bitmap backup0 --checkpoint qcow2:/backup/full.qcow2

Exits with 0 when the bitmap is there and verified, 3 when it is and parts could not be read (they count
as dirty), 2 when it is not.
"""

# It looks for the last name in its folder's DOMAIN.cpt, and does nothing where a checkpoint is called otherwise
# (libvirtnbdbackup/virt/checkpoint.py).
_VIRTNBDBACKUP = "virtnbdbackup.N, N the number of its last backup"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "attach",
        help="put the difference into a dirty bitmap of a running QEMU",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_disks(parser)
    _add_bitmap(parser)
    _add_danger(parser)
    reading.scan(parser)
    reading.access(parser)
    options.json_flag(parser)
    parser.set_defaults(run=run)


def _add_disks(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--qmp", metavar="SOCKET", help="QEMU's monitor, a unix socket")
    where.add_argument("--domain", metavar="DOMAIN", help="libvirt's domain, through virsh")
    parser.add_argument("--connect", metavar="URI", help="with --domain: virsh's --connect")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--node", help="the disk by its block node")
    which.add_argument("--device", metavar="ID", help="the disk by its device's id")
    which.add_argument("--target", metavar="DEV", help="with --domain: the disk as vda, sda ...")
    which.add_argument(
        "--disk",
        action="append",
        metavar="NODE=REFERENCE:BITMAP",
        help="repeated: several disks of one VM, recorded from one instant (with --domain: DEV=...)",
    )
    parser.add_argument("reference", nargs="?", metavar="REFERENCE", help="the backup")


def _add_bitmap(parser: argparse.ArgumentParser) -> None:
    options.bitmap(parser)
    options.granularity(parser)
    parser.add_argument(
        "--transient", action="store_true", help="a bitmap that ends with QEMU, even in a qcow2"
    )
    parser.add_argument(
        "--merge",
        action="store_true",
        help="add to a good bitmap of that name, which keeps its granularity, instead of refusing",
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace an inconsistent bitmap of that name"
    )
    parser.add_argument(
        "--checkpoint",
        action="store_true",
        help="with --domain: register the bitmap with libvirt as a checkpoint of its name",
    )
    parser.add_argument(
        "--keep-on-failure",
        action="store_true",
        help="when it fails, leave the bitmap, recording and with every bit set",
    )


def _add_danger(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directory",
        metavar="FOLDER",
        help="where the private folder is made, which QEMU must reach (the domain's own; else /tmp)",
    )
    parser.add_argument(
        "--nbd-server",
        metavar="ADDRESS",
        help="use the NBD server that this QEMU runs already: a socket's path from /, or HOST:PORT",
    )
    parser.add_argument(
        "--reference-side-only",
        action="store_true",
        help="use QEMU for recording only, and read the raw disk's file directly",
    )
    parser.add_argument(
        "--accept-iothread-risk",
        action="store_true",
        help="QEMU below 9.0 with an iothread that a guest's device uses: go on, though the VM aborts if "
        "posthoc is killed, and may crash if a client of another NBD export is busy",
    )


def run(arguments: argparse.Namespace) -> int:
    """Attach, and show what became of each disk."""
    wanted = request(arguments)
    with bar.shown() as shown:

        def watch(_: str, now: progress.ScanStatistics) -> None:
            if shown is not None:
                shown(now)

        outcomes = trio.run(_interruptible, arguments, wanted, watch)
    facts = [_facts(wish, outcome) for wish, outcome in zip(wanted.wishes, outcomes, strict=True)]
    if arguments.json:
        sys.stdout.write(report.as_json({"disks": facts}))
    else:
        sys.stdout.write("\n".join(report.as_text(disk) for disk in facts))
        _say_what_for(outcomes, wanted, arguments.domain)
    return max(_tell(outcome) for outcome in outcomes)


def request(arguments: argparse.Namespace) -> examined.Request:
    """Return what was asked for; UserError where it does not go together."""
    if arguments.domain is None:
        for option in ("connect", "target", "checkpoint"):
            if getattr(arguments, option):
                raise errors.UserError(f"--{option} goes with --domain")
    wanted = examined.Request(
        wishes=tuple(_wishes(arguments)),
        granularity=arguments.granularity,
        transient=arguments.transient,
        checkpoint=arguments.checkpoint,
        merge=arguments.merge,
        replace=arguments.replace,
        keep_on_failure=arguments.keep_on_failure,
        accept_iothread_risk=arguments.accept_iothread_risk,
        reference_side_only=arguments.reference_side_only,
        rate=arguments.rate,
        workers=arguments.workers,
        without=reading.without(arguments),
        allow_shrunk=arguments.allow_shrunk,
        directory=arguments.directory,
        nbd_server=arguments.nbd_server,
        options=reading.image_options(arguments),
    )
    if wanted.checkpoint and any(wish.by != "target" for wish in wanted.wishes):
        raise errors.UserError("--checkpoint goes with --target, or --disk: libvirt knows no nodes")
    if wanted.checkpoint and len({wish.bitmap for wish in wanted.wishes}) > 1:
        raise errors.UserError("--checkpoint: a checkpoint's bitmaps all have its name")
    if wanted.checkpoint and not virsh.CHECKPOINT_NAME.fullmatch(wanted.wishes[0].bitmap):
        raise errors.UserError(
            f"{wanted.wishes[0].bitmap}: libvirt names no checkpoint so (letters, digits, _, - and inner dots)"
        )
    return wanted


def _wishes(arguments: argparse.Namespace) -> list[examined.Wish]:
    if arguments.disk is not None:
        if arguments.reference is not None:
            raise errors.UserError(f"{arguments.reference}: with --disk a reference is part of it")
        return [_wish(text, arguments.domain is not None) for text in arguments.disk]
    if arguments.reference is None:
        raise errors.UserError("REFERENCE is missing: the backup to compare the disk with")
    if arguments.node is not None:
        return [examined.Wish(arguments.node, arguments.reference, arguments.bitmap)]
    if arguments.device is not None:
        return [examined.Wish(arguments.device, arguments.reference, arguments.bitmap, "device")]
    return [examined.Wish(arguments.target, arguments.reference, arguments.bitmap, "target")]


def _wish(text: str, of_domain: bool) -> examined.Wish:
    """Parse NODE=REFERENCE:BITMAP. A reference may have colons, a node's name no "="."""
    disk, equals, rest = text.partition("=")
    reference, colon, bitmap = rest.rpartition(":")
    if not (disk and equals and reference and colon and bitmap):
        raise errors.UserError(f"--disk {text}: is not of the form NODE=REFERENCE:BITMAP")
    return examined.Wish(disk, reference, bitmap, "target" if of_domain else "node")


def _connector(arguments: argparse.Namespace) -> attached.Connect:
    if arguments.domain is not None:
        return lambda: virsh.connect(arguments.domain, arguments.connect)
    return lambda: qmp.connect(arguments.qmp)


async def _interruptible(
    arguments: argparse.Namespace, request: examined.Request, watch: attached.Watch
) -> list[attached.Outcome]:
    """Attach; a signal ends it in order."""
    interrupt = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        # Outside of what it cancels: while that is ending, a signal must not meet Python's own handlers.
        await nursery.start(_cancel_on_signal, interrupt)
        with interrupt:
            outcomes = await attached.attach(_connector(arguments), request, watch=watch)
        nursery.cancel_scope.cancel()
    if interrupt.cancelled_caught:
        raise KeyboardInterrupt
    return outcomes


async def _cancel_on_signal(
    interrupt: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    """Cancel at the first signal; what is taken back then is not to be cut short by a second."""
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            if interrupt.cancel_called:
                log.warning("ending already: what was added to QEMU is being taken back")
            interrupt.cancel()


def _facts(wish: examined.Wish, outcome: attached.Outcome) -> dict[str, Any]:
    now, target = outcome.statistics, outcome.disk.target
    return {
        "state": now.state,
        "node": target.node,
        "reference": wish.reference,
        "bitmap": target.bitmap,
        "persistent": target.persistent,
        "size": now.size,
        "granularity": outcome.disk.granularity,
        "scanned": now.scanned,
        "skipped": now.skipped,
        "differing": now.differing,
        "dirty": outcome.held,
        "errors": now.error_count,
        "error_list": offline.error_texts(now),
        "savings": now.savings,
    }


def _say_what_for(
    outcomes: list[attached.Outcome], request: examined.Request, domain: str | None
) -> None:
    for outcome in outcomes:
        target = outcome.disk.target
        print(
            f"\n{target.bitmap} of {target.node} records. An incremental backup over the reference:"
        )
        if request.checkpoint:
            print(f"  virsh backup-begin with <incremental>{target.bitmap}</incremental>")
        else:
            print(
                f'  blockdev-backup {{"device": "{target.node}", "target": NODE, "sync": '
                f'"incremental", "bitmap": "{target.bitmap}"}}'
            )
    name = request.wishes[0].bitmap
    if not request.checkpoint:
        print(
            "\nvirsh backup-begin and virtnbdbackup go on from a checkpoint of libvirt's: --domain, --checkpoint "
            f"(virtnbdbackup: --bitmap {_VIRTNBDBACKUP})"
        )
    elif re.fullmatch(r"virtnbdbackup\.\d+", name):
        print(f"  virtnbdbackup -d {domain} -l inc -o FOLDER, where {name} was its last backup")
    else:
        print(f"  virtnbdbackup goes on from its own checkpoint only: --bitmap {_VIRTNBDBACKUP}")


def _tell(outcome: attached.Outcome) -> int:
    """Tell what is to be known of a disk on stderr; return its exit code."""
    for note in outcome.disk.notes:
        print(f"posthoc: {note}", file=sys.stderr)
    now = outcome.statistics
    if now.state == progress.FAILED:
        print(f"posthoc: {now.failure}: what is left counts as dirty", file=sys.stderr)
        return exits.READ_ERROR
    if now.error_count:
        print(
            f"posthoc: {now.error_count} places could not be read: they count as dirty",
            file=sys.stderr,
        )
        return exits.READ_ERROR
    return exits.DONE
