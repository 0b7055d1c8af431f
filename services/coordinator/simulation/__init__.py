"""Models of a fleet and of jobs on it, for services/coordinator/simulate.py."""
