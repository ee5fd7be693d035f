"""What a page is made of, and how it becomes one HTML file; nothing of runs or studies."""
