"""Faults put into a running server under load, and what its clients see of them.

`tests/server/test_faults_*.py` assert what must hold; `bench/faults.py` prints how long it took.
"""
