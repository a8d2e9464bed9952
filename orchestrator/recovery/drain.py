"""Ray's notice that a node of this group is about to be taken away: it is drained, and has a moment left.

Ray Train tells every worker. Its public call for that is a barrier of all ranks, too dear for every iteration; the loop
agrees by a vote that it takes anyway, so what is read here is this process's own copy, which is not public.
"""

from __future__ import annotations

import time

from ray.train.v2._internal.execution.context import get_train_context


def notice() -> str:
    """Return what Ray has told this worker, "" for nothing."""
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return ""
    left = f" in {max(0.0, info.deadline_ms / 1000 - time.time()):.0f} s" if info.deadline_ms else ""
    return f"the node of rank {', '.join(map(str, sorted(info.preempted_ranks)))} is taken away{left}"
