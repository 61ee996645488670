"""Results of runs, for people to read: statistics, a paper's tables, curves, and pages."""
