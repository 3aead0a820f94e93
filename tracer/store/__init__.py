"""Where rows go: writing, publishing and reading the dataset's Parquet files."""
