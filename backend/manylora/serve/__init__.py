"""`manylora serve`: renders the two front ends, runs tritonserver on them and keeps it running."""
