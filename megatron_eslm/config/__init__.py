"""Parse flags, YAML and DeepSpeed's JSON into one resolved run."""
