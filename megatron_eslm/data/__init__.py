"""Text becomes token files, and these become batches."""
