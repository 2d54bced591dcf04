"""Published benchmarks, read from the user's copy in their own formats and scored as their papers do."""
