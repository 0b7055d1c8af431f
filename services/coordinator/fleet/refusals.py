"""What jobs hold against samplers: each stays away from those that drew what it should not."""

from __future__ import annotations


class Refusals:
    """By job, of sampler processes: at most one for each job that runs and each sampler."""

    def __init__(self) -> None:
        # By instance_id, then by job, the last one last.
        self._reasons: dict[str, dict[str, str]] = {}

    def add(self, job: str, instance_id: str, reason: str) -> None:
        """`job` asks nothing more of that process."""
        of_sampler = self._reasons.setdefault(instance_id, {})
        of_sampler[job] = reason

    def drop(self, job: str) -> bool:
        """`job` has ended; whether there were any of it."""
        held = [instance_id for instance_id, jobs in self._reasons.items() if job in jobs]
        for instance_id in held:
            del self._reasons[instance_id][job]
            if not self._reasons[instance_id]:
                del self._reasons[instance_id]
        return bool(held)

    def jobs(self, instance_id: str) -> frozenset[str]:
        """Those that ask nothing of that process."""
        return frozenset(self._reasons.get(instance_id, ()))

    def problem(self, instance_id: str) -> str:
        """What they hold against it, in words; empty: nothing."""
        of_sampler = self._reasons.get(instance_id)
        if not of_sampler:
            return ""
        *_, last = of_sampler.values()
        num_jobs = "1 job" if len(of_sampler) == 1 else f"{len(of_sampler)} jobs"
        return f"in quarantine for {num_jobs}: {last}"
