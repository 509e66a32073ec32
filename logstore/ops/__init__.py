"""Operating a store: retention and compaction, backup and restore, verify and repair, export and import."""
