"""Detects dead and hung ranks and ends the job with a message that names them."""
