"""Benchmarks and long runs: the scripts beside this file are commands, the packages what they are made of."""
