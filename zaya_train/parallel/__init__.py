"""Meshes, collectives, context parallelism and sharding."""
