"""Forward passes without gradient: scores of whole sets, the reference, what tokens earn, generation."""
