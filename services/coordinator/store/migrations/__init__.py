"""Migrations, applied at start in the order of their `down_revision`."""
