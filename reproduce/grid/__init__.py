"""Arms x seeds: which runs are due, who trains them, the plan."""
