"""Export and import: events as text, and those of other stores."""
