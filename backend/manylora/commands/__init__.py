"""The commands of `manylora` besides `serve` and `status`, one module each."""
