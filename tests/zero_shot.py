"""Zero-shot CLIP on the validation images, computed image by image from their pixels."""

from __future__ import annotations

import torch

from cbsa_lightning.method.metrics import MultilabelReport


@torch.no_grad()
def zero_shot_mAP(clip, data) -> float:
    """Returns the mAP of the scaled cosine of image and "a photo of a ...", with unchanged towers."""
    text = torch.nn.functional.normalize(clip.encode_texts([f"a photo of a {n}." for n in data.prompt_names]), dim=-1)
    report = MultilabelReport(len(text))
    for batch in data.val_images():
        image = torch.nn.functional.normalize(clip.image_tokens(batch.images).g, dim=-1)
        report.update(clip.logit_scale * image @ text.T, batch.targets)
    return float(report.compute()["mAP"])
