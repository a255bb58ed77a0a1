"""The paper's tables: their rows, runs, results, pages and pictures."""
