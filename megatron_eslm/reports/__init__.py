"""What runs have cost and reached: tables and curves from metrics files."""
