"""Python's cyclic garbage collector, set for a process that serves for long."""

from __future__ import annotations

import gc

_THRESHOLDS = (50_000, 20, 50)  # allocations, then collections of the generation below


def hold_off() -> None:
    """Lets no collection run before `settle`. For what imports much: of the modules of PyTorch, and
    what they make, nothing is garbage, and a tenth of the time went into looking for it."""
    gc.disable()


def settle() -> None:
    """Takes all that exists now out of the collector's sight, and makes it run seldom.

    A server's steps make thousands of short-lived objects and no cycles to speak of: with the
    default thresholds a tenth of the time goes into looking at modules and live requests again and
    again, and a full look stops a step for milliseconds. Call it when start-up is over.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)
    gc.enable()
