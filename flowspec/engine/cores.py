"""The number of segments that one machine can compute at the same time."""

import os


def segments_at_once(num_stages: int, *, threads: int) -> int:
    """Return the useful number of segments in flight if head and stages share this machine.

    It is the number of cores beside the head's drafter, for stages of `threads` threads each; 0 (no
    limit but the pipeline's own) if every stage has cores of its own. More segments would take
    cores from earlier ones, whose verdicts may show that the later ones are not needed.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    at_once = max(1, ((usable or 1) - threads) // threads)
    return 0 if at_once >= num_stages else at_once
