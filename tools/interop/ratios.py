"""Rates on the mount against rates on the plain directory, of runs that took turns.

Layer: tool.

The ratio is taken turn by turn, so that a busy machine slows both sides; a row tells the median and
the lowest and highest. Missing a goal fails no case: the figures of a busy machine are no verdict.
"""

from collections.abc import Callable, Mapping
from statistics import median
from typing import Final

from interop.cases import Figures, Place

TURNS: Final = 3


def compare(
    run: Callable[[Place, int], Figures], goals: Mapping[str, float], turns: int = TURNS
) -> Figures:
    """Run a case on both places in turns, another one first each turn; return rates and ratios.

    `run` is given the place and the number of the turn. `goals`: least ratio by name of a figure,
    which is a rate; others are left out.
    """
    runs: dict[Place, list[Figures]] = {Place.MOUNT: [], Place.PLAIN: []}
    for turn in range(turns):
        places = list(runs)
        for place in places if turn % 2 == 0 else reversed(places):
            runs[place].append(run(place, turn))
    figures: Figures = {}
    for name, goal in goals.items():
        rates = {place: [float(one[name]) for one in found] for place, found in runs.items()}
        pairs = zip(rates[Place.MOUNT], rates[Place.PLAIN], strict=True)
        ratios = sorted(own / plain for own, plain in pairs)
        verdict = "met" if median(ratios) >= goal else "missed"
        figures[name] = round(median(rates[Place.MOUNT]))
        figures[f"plain {name}"] = round(median(rates[Place.PLAIN]))
        figures[f"{name.split(' ', 1)[0]} ratio"] = (
            f"{median(ratios):.2f} ({ratios[0]:.2f} .. {ratios[-1]:.2f}; goal {goal:.2f} {verdict})"
        )
    return figures
