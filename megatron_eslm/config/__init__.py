"""Flags, YAML and DeepSpeed's JSON become one resolved run."""
