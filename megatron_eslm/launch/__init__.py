"""Start-up of ranks: launchers, rendezvous, process groups, signals."""
