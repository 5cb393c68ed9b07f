"""`make gpu`: one command that says whether the system works on a GPU, and how fast.

Twelve rows in `device`, `head`, `same_numbers`, `curve`, `speed`, `waits`, `resume` and `jobs`;
`ranks` is a second stage for two GPUs. docs/gpu.md says what to do with the table.
"""
