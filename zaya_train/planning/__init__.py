"""What a run will take, by arithmetic alone: memory, traffic, time. Nothing is allocated."""
