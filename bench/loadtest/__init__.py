"""What serving.py is made of: a workload, targets that answer it, a driver between them, and a report.

The rows' origin, their CSV files and their tables serve the other benchmarks too.
"""
