"""What serving.py is made of: a workload, targets that answer it, a driver between them, and a report."""
