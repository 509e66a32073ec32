"""Retention and compaction: what is dropped, and how the rest is put together."""
