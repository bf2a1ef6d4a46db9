"""Reports for people: HTML pages about runs and audits of data."""
