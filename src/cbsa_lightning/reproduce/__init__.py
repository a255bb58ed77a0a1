"""The paper's tables: rows, runs, results, pages and plots."""
