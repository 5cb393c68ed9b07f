"""A checkpoint that any layout writes and any layout reads: saved, found, loaded, continued."""
