"""What is crashed: small histories that together touch every kind of write."""

from collections.abc import Callable

from tests.crash.bench import Bench
from tests.crash.world import LARGE, Geometry

Scenario = Callable[[Bench], None]
SCENARIOS: dict[str, tuple[Geometry, Scenario]] = {}


def scenario(*disks: int, frames: int = 0) -> Callable[[Scenario], Scenario]:
    """Register a scenario on a pool of this shape."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = (Geometry(disks or (16,), frames), function)
        return function

    return register


@scenario()
def put(bench: Bench) -> None:
    """Sync puts of different shapes, one after the other."""
    space = bench.space()
    first = bench.put(space, 1)
    bench.put(space, 3, parent=first[-1].tobytes())
    bench.put(space, 1, partial=700)
    bench.put_again(space, first, "sync")
    wide = bench.space("wide", LARGE)
    bench.put(wide, 2)
