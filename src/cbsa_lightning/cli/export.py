"""`cbsa export`, which writes a trained model as files that work without this library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

FORMATS = "onnx,pt2,safetensors"


def export_command(words: Sequence[str]) -> Path:
    """Runs `cbsa export`.

    Args:
        words: Command-line arguments after ``export``.

    Returns:
        The output folder.

    Raises:
        ConfigError: See :func:`~cbsa_lightning.inference.export.bundle.export`; also raised if the upload fails.
        CheckpointError: See :func:`~cbsa_lightning.inference.export.bundle.export`.
        OutputError: See :func:`~cbsa_lightning.inference.export.bundle.export`.
    """
    args = _parser().parse_args(words)
    # These imports take seconds because of torch, so --help must not trigger them.
    from cbsa_lightning.inference.export.bundle import export
    from cbsa_lightning.inference.hub import push_to_hub
    from cbsa_lightning.inference.labels.versions import checkpoint_and_run

    source, folder = args.source, args.to
    checkpoint, run = checkpoint_and_run(source)
    options = {
        name: value for name in ("clip", "pretrained", "image_size") if (value := getattr(args, name)) is not None
    }
    variants = _names(args.variants)
    for line in export(checkpoint, folder, _names(args.format), _names(args.extra), run, variants, **options):
        print(line)
    total = 0
    for file in sorted(folder.iterdir()):
        total += file.stat().st_size
        print(f"  {file.stat().st_size / 1e6:8.2f} MB  {file.name}")
    print(f"Exported and tested {total / 1e6:.1f} MB: {folder}")
    if args.push_to:
        print(f"Uploaded: {push_to_hub(folder, args.push_to, private=not args.public)}")
    return Path(folder)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cbsa export",
        description="Writes a trained model as a folder of files that predict the same labels without this library.",
    )
    parser.add_argument("source", type=Path, help="folder of a finished run, or a checkpoint file")
    parser.add_argument("--to", type=Path, required=True, help="output folder")
    parser.add_argument("--format", default=FORMATS, help=f"formats, separated by commas (default: {FORMATS})")
    parser.add_argument("--extra", default="", help="additional outputs of the model: attention, context or both")
    parser.add_argument("--variants", default="", help="smaller variants of model.onnx: fp16, int8 or fp16,int8")
    parser.add_argument("--clip", help="location of the CLIP towers if it has changed since training")
    parser.add_argument("--pretrained", help="location of the weights of the towers if it has changed since training")
    parser.add_argument("--image_size", type=int, help="side length of images if the checkpoint does not contain it")
    parser.add_argument("--push_to", metavar="USER/MODEL", help="also upload the folder to the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="create a public repository instead of a private one")
    return parser
