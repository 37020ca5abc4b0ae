"""The short form of the bar `cancels`: clients that leave, leave nothing behind."""

import os

from tests.bars.cancels import FLAGS, measure
from tests.e2e.cluster import Cluster


def test_three_hundred_requests_given_up_at_random_leave_nothing_behind() -> None:
    with Cluster(*FLAGS) as cluster:
        found = measure(cluster, count=300, seed=2)
    assert found.phases.total() == 300
    assert len(found.phases) == 6, "every way to leave was taken"
    # Pools of threads that have not been filled by so few requests may still grow to their size; a leak would be more.
    assert found.failures(spare_threads=min(32, (os.cpu_count() or 1) + 4)) == []
