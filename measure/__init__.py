"""Everything that writes results/."""
