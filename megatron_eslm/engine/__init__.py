"""DeepSpeed engines around the model: one optimizer step, with and without a pipeline."""
