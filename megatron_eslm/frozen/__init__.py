"""Frozen models: references and teachers, and the objectives that use a teacher."""
