"""Long runs against a real server (faults, hostile input, a soak), and and what the server tests share."""
