"""Files: atomic writing, checked reading, and the folder of a run."""
