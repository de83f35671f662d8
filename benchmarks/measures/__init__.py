"""Benchmarks of aiotaskq, one module for each topic."""
