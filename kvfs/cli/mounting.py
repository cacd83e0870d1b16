"""Owning a mounted pool until it is unmounted, or another process takes both over.

Layer: L5.
"""

from typing import TYPE_CHECKING

from kvfs.cli.daemon import Ready
from kvfs.cli.estate import Estate
from kvfs.cli.respawn import Plan
from kvfs.cli.service import owned
from kvfs.cli.succession import Succession
from kvfs.cli.takeover import Heirs
from kvfs.fuse import core_messages
from kvfs.fuse.mount import MountOptions, mount, serve_inherited
from kvfs.fuse.passing import Passing
from kvfs.pool import Pool

if TYPE_CHECKING:
    from collections.abc import Callable


def own_mounted(
    plan: Plan, estate: Estate, options: MountOptions, ready: Ready, *,
    foreground: bool = False, is_respawned: bool = False,
) -> None:  # fmt: skip
    """Open the pool, mount it, and serve both.

    Args:
        plan: Which, where, and how.
        estate: What the last owner has left.
        options: Of the mount.
        ready: Called once, when the mount answers.
        foreground: See `mount`.
        is_respawned: The mount's core started this process.

    Raises:
        KvfsError: As `owned` and `mount`.
    """
    heirs = Heirs(mount=plan.directory)
    passing = Passing(estate.keep_door, stays=plan.stays_mounted)
    waiting: list[Callable[[], None]] = [ready]
    admit: list[Callable[[], None]] = []

    def answers() -> None:
        admit.pop()()
        while waiting:
            waiting.pop()()
        estate.confirm()
        heirs.core_version = core_messages.VERSION if estate.door_fd >= 0 else 0
        heirs.open(passing.leave)

    def serve(pool: Pool) -> None:
        if is_respawned and passing.door_fd < 0:
            serve_inherited(pool, options, on_ready=answers, passing=passing)
        else:
            mount(
                pool, plan.directory, foreground=foreground, options=options, on_ready=answers,
                passing=passing,
            )  # fmt: skip

    def work(pool: Pool) -> None:
        passing.door_fd = estate.door_fd
        serve(pool)
        if not passing.is_left:
            estate.keep_door(-1)  # the mount is gone, and its core

    Succession(estate, heirs, mount=plan.directory, end_fd=lambda: -1).run(
        lambda: owned(
            plan.service, estate, mount=plan.directory, heirs=heirs,
            is_waited_for=is_respawned or estate.door_fd >= 0, admit=admit,
        ),
        work,
    )  # fmt: skip
