"""Phases of a run as typed rows and pure lookups."""
