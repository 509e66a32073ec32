"""Backup and restore: manifests over a pool of content-addressed files."""
