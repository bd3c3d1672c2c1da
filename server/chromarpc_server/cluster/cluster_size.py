"""How many actors there are to be: decided from what the settings say, what the cluster has, and what waits."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClusterSize:
    """What `--devices ray…` says."""

    least: int = 0
    """Asked for whether they are used or not."""
    most: int | None = None
    """None: as many as the cluster has."""

    @property
    def follows_jobs(self) -> bool:
        """Whether the number follows the queue, so that Ray's autoscaler does."""
        return self.most is not None and self.most > self.least

    def wanted(self, *, in_cluster: int, jobs: int) -> int:
        """How many to ask Ray for.

        Args:
            in_cluster: GPUs that the cluster has, used or not; CPUs where actors compute on them.
            jobs: that wait and run.
        """
        if self.most is None:
            return in_cluster
        return min(max(jobs, self.least), self.most)
