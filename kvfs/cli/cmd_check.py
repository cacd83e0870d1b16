"""`kvfs-admin check`: verify every invariant of a closed pool, and repair it.

Layer: L5.
"""

import argparse
from typing import TYPE_CHECKING, Any

from kvfs.cli.console import Console, confirm, counted
from kvfs.cli.options import AddCommand, add_changing, add_command
from kvfs.cli.progress import Progress
from kvfs.cli.runner import exit_codes, set_up_logging
from kvfs.cli.session import find_pool
from kvfs.errors import RefusedError, UsageError

if TYPE_CHECKING:
    from kvfs.engine.checker import CheckReport, Finding


def add(verbs: AddCommand) -> None:
    """Define the command."""
    check = add_command(
        verbs, "check", check_pool, "check",
        "Check every invariant of a pool that is closed. With --repair, show what would be done, "
        "ask, do it, and check again: damaged blocks and segments are dropped, names of files that "
        "are not whole removed, leftovers deleted.",
        f"offline; {exit_codes(2, 3, 10, 11, 13, 14, 15, 16)}",
    )  # fmt: skip
    check.add_argument(
        "--data", action="store_true", help="read all payloads and compare their checksums"
    )
    check.add_argument("--repair", action="store_true", help="repair what can be repaired")
    check.add_argument(
        "--allow-name-loss", action="store_true",
        help="with --repair: keep a damaged catalog aside and put an empty one in its place; all "
        "names of files and contexts are lost, blocks stay as cache",
    )  # fmt: skip
    add_changing(check, is_destructive=True)


def check_pool(arguments: argparse.Namespace, console: Console) -> int:
    """Check, and repair if asked to."""
    from kvfs.admin.raw import copied_catalog
    from kvfs.engine import checker
    from kvfs.errors import DataError

    set_up_logging(is_verbose=console.is_verbose)
    if arguments.allow_name_loss and not arguments.repair:
        raise UsageError("--allow-name-loss goes with --repair")
    path = find_pool(arguments)
    name = path.name
    if arguments.repair and not arguments.dry_run:
        try:
            catalog = copied_catalog(path)
        except DataError:
            pass  # the check says more about it
        else:
            name = catalog.meta("name") or name
            catalog.close()
    refusal: list[RefusedError] = []

    def agree(report: "CheckReport") -> bool:
        if not console.is_json:
            _print_findings(report.findings, console)
            console.put(f"repairing pool {name}:")
            for action in report.plan:
                console.put(f"  {action}")
        try:
            confirm(console, name, is_yes=arguments.yes)
        except RefusedError as error:
            refusal.append(error)
            return False
        return True

    is_repair = arguments.repair and not arguments.dry_run
    with Progress(console, "check") as progress:
        report = checker.check_pool(
            path, data=arguments.data, repair=is_repair,
            allow_name_loss=arguments.allow_name_loss, progress=progress, confirm=agree,
        )  # fmt: skip
    if refusal:
        raise refusal[0]
    if console.is_json:
        console.put_json("check", _fields(report))
        return report.exit_code
    _print_report(report, console, is_plan_shown=arguments.repair and not is_repair)
    return report.exit_code


def _print_report(report: "CheckReport", console: Console, *, is_plan_shown: bool) -> None:
    if report.is_repaired:
        console.put(f"applied {len(report.plan)} steps; still there:" if report.remaining else
                    f"applied {len(report.plan)} steps; nothing is wrong any more")  # fmt: skip
        _print_findings(report.remaining, console)
    else:
        _print_findings(report.findings, console)
    if is_plan_shown and report.plan:
        console.put("would repair:")
        for action in report.plan:
            console.put(f"  {action}")
        console.say("nothing was changed")
    counts = report.counts
    console.say(
        f"checked {counted(counts.devices, 'device')}, {counted(counts.segments, 'segment')}, "
        f"{counted(counts.blocks, 'block')} of {console.size(counts.block_bytes)}, "
        f"{counted(counts.files, 'file')}"
        + (f"; read {console.size(counts.verified_bytes)}" if counts.verified_bytes else "")
    )
    if not report.was_closed:
        console.say("the last owner did not close the pool; the next open takes it over")
    if not report.is_repaired and report.exit_code and report.plan and not is_plan_shown:
        console.say("now 'kvfs-admin check --repair' (with --dry-run it shows the plan only)")
    elif report.exit_code == 0:
        console.say("nothing is wrong")


def _print_findings(findings: "list[Finding]", console: Console) -> None:
    for finding in findings:
        severity = console.paint(finding.severity.name.lower())
        console.put(f"{severity}: {finding.where}: {finding.message}; {finding.remedy}")


def _fields(report: "CheckReport") -> dict[str, Any]:
    """Return the report as JSON fields."""
    counts = report.counts
    return {
        "findings": [_finding(finding) for finding in report.findings],
        "plan": [
            {"kind": action.kind.value, "where": action.where, "entries": list(action.entries)}
            for action in report.plan
        ],
        "is_repaired": report.is_repaired,
        "remaining": [_finding(finding) for finding in report.remaining],
        "was_closed": report.was_closed,
        "counts": {name: getattr(counts, name) for name in type(counts).__slots__},
    }


def _finding(finding: "Finding") -> dict[str, Any]:
    return {
        "severity": finding.severity.name.lower(),
        "code": finding.code,
        "where": finding.where,
        "message": finding.message,
        "remedy": finding.remedy,
        "is_repairable": finding.is_repairable,
    }
