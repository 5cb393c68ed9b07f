"""Models in Hugging Face's format: state dicts and folders."""
