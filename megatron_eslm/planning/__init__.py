"""What a layout would cost on machines that one does not have: time, memory and traffic of a step.

Everything here is a prediction; docs/scaling.md says from what, and benchmarks/plan_check.py how
far off it is where it can be measured.
"""
