"""What a check finds: findings, what repair would do about them, and figures.

Layer: L3, pure.

- A finding has a code that programs may compare and a message for people: what, where, what to do.
- NOTE is what a crash may leave and the next open puts right by itself; it does not make a pool
  unclean. WARNING is wrong, but nothing stored is lost by it. ERROR is damage: something stored can
  no longer be served.
- Whatever can be repaired has an `Action`; the plan that is printed is the one that is applied.
"""

from dataclasses import dataclass, field
from enum import Enum, IntEnum


class Severity(IntEnum):
    """How bad a finding is."""

    NOTE = 1
    WARNING = 2
    ERROR = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it must be.

    Attributes:
        code: Stable word, e.g. 'entry-damaged'.
        where: Place, e.g. 'ssd0 segment 118 generation 7 entry 3'.
        message: What is wrong: expected, found.
        remedy: What to do.
        is_repairable: Whether the plan has an action for it.
    """

    severity: Severity
    code: str
    where: str
    message: str
    remedy: str
    is_repairable: bool = False

    def __str__(self) -> str:
        return f"{self.severity.name.lower()}: {self.message}: {self.where}; {self.remedy}"


class ActionKind(Enum):
    """What repair can do."""

    FREE_SEGMENT = "free segment"
    DROP_BLOCKS = "drop blocks"
    FORGET_SEAL = "forget seal"
    REMOVE_NAMES = "remove names"
    REAP_STAGING = "reap staging"
    FREE_RAW = "free raw file"
    REBUILD_SUPERBLOCK = "rebuild superblock"
    REPLACE_CATALOG = "replace catalog"


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a repair. Which fields count depends on `kind`.

    Attributes:
        device_index: Device; -1 for the catalog.
        slot: Segment, with `generation`.
        entries: DROP_BLOCKS: entries of the segment, ascending.
        node_ids: REMOVE_NAMES: files of the catalog. FREE_RAW: numbers of raw files.
    """

    kind: ActionKind
    where: str
    device_index: int = -1
    slot: int = 0
    generation: int = 0
    entries: tuple[int, ...] = ()
    node_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        count = len(self.entries) or len(self.node_ids)
        return f"{self.kind.value}: {self.where}" + (f" ({count})" if count else "")


@dataclass(slots=True)
class CheckCounts:
    """What was looked at."""

    devices: int = 0
    segments: int = 0
    sealed_segments: int = 0
    blocks: int = 0
    block_bytes: int = 0
    files: int = 0
    verified_blocks: int = 0
    verified_bytes: int = 0


@dataclass(slots=True)
class CheckReport:
    """The result of a check.

    Attributes:
        findings: In the order found.
        plan: What repair would do, or did.
        is_repaired: The plan was applied.
        remaining: After a repair: what a second check still finds.
        was_closed: Every device says that its last owner closed it.
    """

    findings: list[Finding] = field(default_factory=list)
    plan: list[Action] = field(default_factory=list)
    counts: CheckCounts = field(default_factory=CheckCounts)
    was_closed: bool = True
    is_repaired: bool = False
    remaining: list[Finding] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing at all was found."""
        return not self.findings

    @property
    def worst(self) -> Severity | None:
        """The worst severity that is there now: of `remaining` after a repair."""
        found = self.remaining if self.is_repaired else self.findings
        return max((finding.severity for finding in found), default=None)

    @property
    def exit_code(self) -> int:
        """0: at most notes; 3: something is wrong; 14: damaged."""
        worst = self.worst
        return 14 if worst is Severity.ERROR else 3 if worst is Severity.WARNING else 0

    def add(
        self, severity: Severity, code: str, where: str, message: str, remedy: str,
        action: Action | None = None,
    ) -> None:  # fmt: skip
        """Note a finding and, where there is one, its repair."""
        self.findings.append(Finding(severity, code, where, message, remedy, action is not None))
        if action is not None:
            self.plan.append(action)
