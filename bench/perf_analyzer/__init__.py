"""NVIDIA's load generator on a server: how it is fetched, run and read."""
