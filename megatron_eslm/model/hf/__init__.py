"""GPT-2 in Hugging Face's format: names of weights and fields of config.json."""
