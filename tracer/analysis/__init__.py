"""Why the load is uneven: pure functions on tables. The only place that imports pandas."""
