"""Verify, scrub, dump and repair: what a store's bytes are, and what they should be."""
