"""Benchmarks of a whole server, from outside: what its clients see and what its processes cost."""
