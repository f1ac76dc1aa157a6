"""The offline simulator: traces, replays, costs and the optimum."""
