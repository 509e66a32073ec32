"""Benchmarks: `python -m bench` runs them all, `python -m bench.append` and so on one.

Every figure stands beside a peer's, measured in the same run: alone it would say nothing. `turns` lets contenders take
turns, `claims` says what must hold between them, `command` is the command line of all; `peers` has the stores.
"""
