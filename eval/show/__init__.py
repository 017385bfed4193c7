"""The third room: a line of the table computed once, then table, plot and page."""
