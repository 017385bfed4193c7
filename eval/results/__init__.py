"""The second room: what was measured, as a file."""
