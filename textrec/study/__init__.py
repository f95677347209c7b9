"""Claims, records, runs, tables, figures and the report."""
