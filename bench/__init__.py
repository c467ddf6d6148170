"""Benchmarks: figures as JSON, each with the machine, the versions and the parameters they were taken with."""
