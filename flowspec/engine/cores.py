"""How much of a pipeline one machine can run at the same time."""

import os


def segments_at_once(num_stages: int, *, threads: int) -> int:
    """Segments that are worth having in flight where head and stages share this machine's cores.

    As many as there are cores beside the head's drafter, for stages of so many threads; 0 (no limit
    but the pipeline's own) where every stage has cores of its own. More would take them from the
    segments before, whose verdicts may show that they are not needed.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, ((usable or 1) - threads) // threads)
    return 0 if at_once >= num_stages else at_once
