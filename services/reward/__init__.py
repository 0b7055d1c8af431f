"""The reward service: scores completions with named functions."""
