"""What stands between clients and the engine: Triton's models, the wire contract, text."""
