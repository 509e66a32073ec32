"""Benchmarks. Every figure stands beside a peer's, measured in the same run: alone it would say nothing."""
