"""A long mixed load on a running server: what is asked, who asks it, and whether memory stays flat."""
