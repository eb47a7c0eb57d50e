"""Benchmarks of h2keep beside the clients that it stands in for; see README.md."""
