"""What runs gave, for people: statistics, a paper's tables, curves, and pages."""
