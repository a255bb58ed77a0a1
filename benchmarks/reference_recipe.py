"""Implements the training step as in the related code: the same computation as the library, without its optimizations.

As in the related code (see ``docs/explanation/speed.md``), prompts use all 77 tokens, memory is contiguous, batch norms
are not folded, and queries are repeated for each image. The loss is read on the host in each step, and the average
covers the complete state dict. Labeled and unlabeled images share one pass (as in CAP and SCPNet), and so do both
prompt sets (as in DualCoOp). Unlike the related code, this one builds no graph below the pool, computes no unused
attention, and creates no unused weak views.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.data.batches import TrainBatch
from cbsa_lightning.method.losses import asymmetric_loss, context_loss
from cbsa_lightning.networks.cbsa import CBSANetwork
from cbsa_lightning.networks.decoder import LabelDecoder


class StockDecoder(nn.Module):
    """The label decoder with torch's attention layers, which repeat the queries for each image and return attention."""

    def __init__(self, decoder: LabelDecoder) -> None:
        super().__init__()
        self.blocks = copy.deepcopy(decoder.blocks)

    def forward(self, queries: Tensor, local: Tensor, places: Tensor) -> Tensor:
        """Returns features ``(B, C, d)``; see :class:`LabelDecoder`."""
        labels = self._scaled(queries - queries.mean(0)).expand(len(local), -1, -1)
        keys, values = self._scaled(places - places.mean(1, keepdim=True)), self._scaled(local + places)
        x = labels
        for block in self.blocks:
            y = block.norm1(x)
            x = x + block.dropout(block.self_attention(y, y, y)[0])
            x = x + block.dropout(block.cross_attention(block.norm2(x) + labels, keys, values)[0])
            hidden = block.dropout(block.linear1(block.norm3(x)).relu())
            x = x + block.dropout(block.linear2(hidden))
        return x

    @staticmethod
    def _scaled(x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * x.shape[-1] ** 0.5


class ReferenceRecipe(nn.Module):
    """CBSA's network, built from the layers of torch and open_clip.

    Args:
        clip: Newly loaded towers with the frozen weights of ``network``.
        network: The library's network, whose trainable weights are copied.
    """

    def __init__(self, clip: FrozenCLIP, network: CBSANetwork) -> None:
        super().__init__()
        self.clip = clip
        self.clip.pool.load_state_dict(network.clip.pool.state_dict())
        self.clip.pool.requires_grad_(True)
        self.decoder = StockDecoder(network.decoder)
        self.prompts = nn.ModuleList([copy.deepcopy(network.target_prompts), copy.deepcopy(network.semantic_prompts)])
        self.context_head = copy.deepcopy(network.context_head)
        self.log_scale = copy.deepcopy(network.log_scale)
        length = clip.context_length
        self.register_buffer("mask", torch.full((length, length), float("-inf")).triu(1))

    def start_training(self) -> None:
        """Creates the optimizer and the average, which includes frozen weights."""
        self.average = copy.deepcopy(self.state_dict())
        self.optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], 1e-3, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.log_scale.is_cuda)

    def encode_text(self) -> tuple[Tensor, Tensor]:
        """Returns target and semantic features ``(C, d)``, from one pass over all 77 positions."""
        text = self.clip.text
        embeddings, end = (torch.cat(part) for part in zip(*(prompts() for prompts in self.prompts), strict=True))
        x = nn.functional.pad(embeddings, (0, 0, 0, text.context_length - embeddings.shape[1]))
        x = text.ln_final(text.transformer(x + text.positional_embedding, attn_mask=self.mask))
        target, semantic = (x[torch.arange(len(x)), end] @ text.text_projection).chunk(2)
        return target, semantic

    def forward(self, images: Tensor, target: Tensor, semantic: Tensor) -> tuple[Tensor, Tensor]:
        """Returns logits ``(B, C)`` and context logits ``(B, K)``."""
        features = self.clip.features(images)
        tokens = self.clip.pool(features)
        aligned = self.decoder(semantic.to(tokens.l.dtype), tokens.l, self.clip.pool.values(features).l)
        z = nn.functional.normalize(aligned.float(), dim=-1)
        t = nn.functional.normalize(target.float(), dim=-1)
        return self.log_scale.exp() * (z * t).sum(-1), self.context_head(tokens.g)

    def loss(self, batch: TrainBatch, pseudo: Tensor, contexts: Tensor) -> Tensor:
        """Computes Eq. 12 on one batch."""
        with torch.autocast(batch.images.device.type, torch.float16, enabled=batch.images.is_cuda):
            logits, context_logits = self(batch.images, *self.encode_text())
        targets = torch.where(batch.labeled[:, None], batch.targets, pseudo[batch.index])
        total = asymmetric_loss(logits, targets).sum() + context_loss(context_logits, contexts[batch.index]).sum()
        return total / len(batch.images)

    def step(self, batch: TrainBatch, pseudo: Tensor, contexts: Tensor) -> float:
        """Runs one training step and returns the loss, which is read on the host as in the related code."""
        loss = self.loss(batch, pseudo, contexts)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.update()
        return loss.item()

    @torch.no_grad()
    def update(self) -> None:
        """Runs the optimizer step and then updates the average of the state dict, tensor by tensor."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for name, value in self.state_dict().items():
            if value.is_floating_point():
                self.average[name].copy_(0.9997 * self.average[name] + 0.0003 * value)
