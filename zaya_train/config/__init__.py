"""Typed configuration: schema, derived values, checks. Standard library only."""
