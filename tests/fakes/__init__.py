"""Stand-ins that behave: each keeps the promises of what it stands for."""
