"""The whole mesh on one machine: every service as a process of its own, from one file."""
