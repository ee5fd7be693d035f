"""The report of a study: arms and measures, forgetting by age, differences; and of its budgets."""
