"""The commands: LightningCLI with overlays, `--resume`, `cbsa check` and `cbsa label`."""
