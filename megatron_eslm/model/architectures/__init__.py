"""Architectures: what differs between GPT-2, Llama and others, one module each."""
