"""Pictures and the report page of a run."""
