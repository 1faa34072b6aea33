"""What `gpu_suite.py` and `tune_plans.py` are made of."""
