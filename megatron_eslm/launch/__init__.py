"""How the ranks of a job start, meet, and are told to stop."""
