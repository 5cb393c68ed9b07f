"""Predict time, memory and traffic of a step in a layout, on machines that are not at hand.

docs/scaling.md describes the model behind the predictions; benchmarks/plan_check.py compares them
with measurements.
"""
