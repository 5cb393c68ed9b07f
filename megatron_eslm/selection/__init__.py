"""What is kept: policies, alpha, and what they know of a step."""
