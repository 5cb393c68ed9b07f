"""Strict reading and atomic writing of files that other processes may share or damage."""
