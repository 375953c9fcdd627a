"""Step 4 of a call, RECORD: one file for each family of calls."""
