"""Many merges, compared, to choose one."""
