"""References: futures, and the values and channels behind them (layer 4)."""
