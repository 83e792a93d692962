"""`scripts/benchmark`: hpsearch side by side with what one would use instead."""
