"""Reports from metrics files: tables and curves of what runs cost and reached."""
