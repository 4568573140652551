"""autodiff side by side with what torch ships, as ratios from interleaved runs."""
