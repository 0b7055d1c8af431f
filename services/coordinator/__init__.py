"""The coordinator: jobs, adapters, the scheduler and the fleet."""
