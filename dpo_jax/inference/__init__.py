"""Forward passes without gradients: dataset log-probs, the reference, per-token rewards, generation."""
