"""Models that only look on: references, teachers, and the objectives that need one."""
