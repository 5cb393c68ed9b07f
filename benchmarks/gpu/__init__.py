"""`make gpu`: one command that says whether the system works on a GPU, and how fast.

One GPU: `device`, `head`, `same_numbers`, `curve`, `speed`, `waits`, `resume`, `saving` and `jobs`;
`ranks` is a second stage for two GPUs. docs/first-gpu-run.md says what to do with the table.
"""
