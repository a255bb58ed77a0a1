"""Lower bound (floor) of the time of a training step: all necessary parts in their fastest known implementation.

The parts are the frozen image tower, and the forward and backward passes of the attention pool, the text tower and the
decoder. The loss, the optimizer, the weight average, the training loop and the dropout masks of the decoder are
excluded. Apart from dropout, the parts compute the same functions as the library; ``tests/test_floor.py`` compares
outputs and gradients. The implementation differs from that of the library in these points:

- *Frozen weights* are stored in the precision of the computation. Normalization layers and constant factors are folded
  into the linear layers that follow them.
- *Image tower*: on a CPU, torch freezes the graph, fuses activations into convolutions, and reorders weights once.
- *Text tower*: prompts have no padding, also on a GPU. The keys and values of the start token are constants, because
  the tower is causal.
- On a GPU, the whole step is captured as one graph, so the host does not launch individual kernels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measuring import Took, timed
from torch import Tensor, nn
from workload import HALF, Workload, autocast, on

from cbsa_lightning.networks.cbsa import CBSANetwork
from cbsa_lightning.networks.decoder import LabelDecoder


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Computes attention with the faster of two implementations.

    Queries, keys and values have the shape (B, heads, L, e). The mask (L, S) is added to the logits.
    """
    if q.is_cuda or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    weights = (q * scale) @ k.transpose(-2, -1)
    if mask is not None:
        weights = weights + mask
    return weights.softmax(-1) @ v


def image_tower(network: CBSANetwork, kind: torch.dtype, images: Tensor) -> Callable[[], Tensor]:
    """Returns a function that computes the frozen features of the images."""
    clip = network.clip
    tower: Any = copy.deepcopy(clip.tower).to(kind).eval()

    def inputs() -> Tensor:
        x = (images.to(clip.mean.dtype) / 255 - clip.mean) / clip.std
        return x.to(kind, memory_format=torch.channels_last)

    if not images.is_cuda:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            tower = torch.jit.optimize_for_inference(torch.jit.trace(tower, inputs()))

    def run() -> Tensor:
        with torch.no_grad():
            return tower(inputs())

    return run


class TextTower:
    """CLIP's text tower with folded weights, for prompts that end at the last position.

    Args:
        tower: Text tower with SiLU as activation; see ``FrozenCLIP.speed_up``.
        start: Embedding of the start token (w,), the first token of all prompts.
        kind: Precision of the computation.
    """

    def __init__(self, tower: Any, start: Tensor, kind: torch.dtype) -> None:
        self.positions = tower.positional_embedding.detach().to(kind)
        self.norm = tower.ln_final
        self.projection = tower.text_projection.detach()
        blocks = tower.transformer.resblocks
        self.heads, self.scale = blocks[0].attn.num_heads, blocks[0].attn.head_dim ** -0.5
        self.blocks = [[weight.to(kind) for weight in self._folded(block)] for block in blocks]
        self.starts = list(self._starts(start.to(kind) + self.positions[0]))

    @staticmethod
    @torch.no_grad()
    def _folded(block: Any) -> list[Tensor]:
        """Returns the weights of a block: those of the attention and of both layers of the feed-forward part."""
        attn, mlp = block.attn, block.mlp
        attended = _with_norm(block.ln_1, attn.in_proj_weight, attn.in_proj_bias)
        hidden = _with_norm(block.ln_2, mlp.c_fc.weight, mlp.c_fc.bias)
        return [*attended, attn.out_proj.weight, attn.out_proj.bias, *hidden, mlp.c_proj.weight, mlp.c_proj.bias]

    @torch.no_grad()
    def _starts(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the key and the value of the start token, (1, heads, 1, e), for each block."""
        width = len(x)
        for w, b, *rest in self.blocks:
            k, v = F.linear(F.layer_norm(x, (width,)), w[width:], b[width:]).chunk(2)
            yield k.view(1, self.heads, 1, -1), v.view(1, self.heads, 1, -1)
            x = self._rest(x, v, *rest)  # the start token attends only to itself

    def __call__(self, prompts: list[Tensor]) -> Tensor:
        """Encodes groups of P prompts (P, L, w), without start tokens, to the features (d) of all prompts."""
        width = self.positions.shape[1]
        shapes = [prompt.shape[:2] for prompt in prompts]
        sizes, numbers = [n * length for n, length in shapes], [n for n, _ in shapes]

        def grouped(x: Tensor) -> list[Tensor]:
            return [piece.unflatten(0, shape) for piece, shape in zip(x.split(sizes), shapes, strict=True)]

        kind = self.positions.dtype
        positions = [self.positions[1 : 1 + length] for _, length in shapes]
        x = torch.cat([(p.to(kind) + at).flatten(0, 1) for p, at in zip(prompts, positions, strict=True)])
        for i, ((w, b, *rest), start) in enumerate(zip(self.blocks, self.starts, strict=True)):
            y = F.layer_norm(x, (width,))
            if i < len(self.blocks) - 1:
                heads = [self._heads(piece) for piece in grouped(F.linear(y, w, b))]
            else:  # only the last token of each prompt is used
                last = torch.cat([piece[:, -1] for piece in grouped(y)])
                queries = F.linear(last, w[:width], b[:width])[:, None].split(numbers)
                keys = grouped(F.linear(y, w[width:], b[width:]))
                heads = [[*self._heads(q), *self._heads(k)] for q, k in zip(queries, keys, strict=True)]
                x = torch.cat([piece[:, -1] for piece in grouped(x)])
            seen = [self._attended(*group, *start) for group in heads]
            x = self._rest(x, torch.cat([piece.transpose(1, 2).flatten(2).flatten(0, 1) for piece in seen]), *rest)
        return self.norm(x.to(self.projection.dtype)) @ self.projection

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, k0: Tensor, v0: Tensor) -> Tensor:
        k, v = (torch.cat([first.expand(len(x), -1, -1, -1), x], dim=2) for first, x in ((k0, k), (v0, v)))
        mask = q.new_full((q.shape[2], k.shape[2]), float("-inf")).triu(2) if q.shape[2] > 1 else None
        return attention(q, k, v, self.scale, mask)

    @staticmethod
    def _rest(x: Tensor, seen: Tensor, *weights: Tensor) -> Tensor:
        w_out, b_out, w1, b1, w2, b2 = weights
        x = x + F.linear(seen, w_out, b_out)
        return x + F.linear(F.silu(F.linear(F.layer_norm(x, x.shape[-1:]), w1, b1)), w2, b2)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        parts = x.view(*x.shape[:2], -1, self.heads, self.positions.shape[1] // self.heads)
        return parts.permute(2, 0, 3, 1, 4).unbind(0)


def _with_norm(norm: nn.LayerNorm, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Folds the weights of a layer norm into the linear layer that follows it."""
    return [weight * norm.weight, bias + weight @ norm.bias]


def text(network: CBSANetwork, kind: torch.dtype) -> Callable[[], tuple[Tensor, Tensor]]:
    """Returns a function that encodes both prompt sets to target and semantic features (C, d)."""
    sets = [network.target_prompts, network.semantic_prompts]
    tower = TextTower(network.clip.text, sets[0].prefix[0, 0], kind)
    ends = torch.cat([prompts.end for prompts in sets]).cpu()
    rows = [((ends == end).nonzero()[:, 0].to(sets[0].end.device), int(end)) for end in ends.unique()]
    order = torch.cat([these for these, _ in rows]).argsort()

    def run() -> tuple[Tensor, Tensor]:
        prompts = torch.cat([torch.cat([prompts.words, prompts.suffix], dim=1) for prompts in sets])
        found = tower([prompts[these, :end] for these, end in rows])[order]
        return found.chunk(2)

    return run


def pool(layer: Any, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the global tokens (B, d), and the local tokens of both paths (B, HW, d)."""
    x = layer._tokens(features, True)
    v = x.through(layer.v_proj)
    q, k, values = (layer._heads(part) for part in (x.through(layer.q_proj), x.through(layer.k_proj), v))
    mixed = attention(q, k, values, q.shape[-1] ** -0.5).permute(2, 0, 1, 3).flatten(2)
    mixed, places = (layer.c_proj(part).transpose(0, 1) for part in (mixed, v[1:]))
    return mixed[:, 0], mixed[:, 1:], places


def decode(decoder: LabelDecoder, queries: Tensor, local: Tensor, places: Tensor) -> Tensor:
    """Returns the label features (B, C, d) without dropout."""
    x, labels, keys, values = decoder.inputs(queries, local, places)
    for block in decoder.blocks:
        y = block.norm1(x)
        x = x + _attend(block.self_attention, y, y, y)
        x = x + _attend(block.cross_attention, block.norm2(x) + labels, keys, values)
        x = x + block.linear2(F.relu(block.linear1(block.norm3(x))))
    return x


def _attend(layer: nn.MultiheadAttention, *inputs: Tensor) -> Tensor:
    projections = zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    batch = max(len(x) for x in inputs)
    q, k, v = (
        F.linear(x, *projection).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).expand(batch, -1, -1, -1)
        for x, projection in zip(inputs, projections, strict=True)
    )
    return layer.out_proj(attention(q, k, v, layer.head_dim**-0.5).transpose(1, 2).flatten(2))


class Floor:
    """Runs the necessary parts of a step, together or each separately."""

    def __init__(self, workload: Workload, device: str, precision: str) -> None:
        self.device, self.precision = device, precision
        kind = HALF.get(precision, torch.float32)
        self.network = workload.module(dropout=0.0).network.to(device).train()
        self.tower = image_tower(self.network, kind, on(device, workload.images()).images)
        self.text = text(self.network, kind)
        self.run: Callable[[], Any] | None = None  # the step, captured on a GPU

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns target features (C, d), global tokens (B, d) and label features (B, C, d)."""
        features = self.tower()
        target, semantic = self.text()
        with autocast(self.device, self.precision):
            g, local, places = pool(self.network.clip.pool, features)
            return target, g, decode(self.network.decoder, semantic.to(local.dtype), local, places)

    def step(self) -> None:
        torch.stack([part.float().sum() for part in self.outputs()]).sum().backward()

    def steps(self, number: int, warm_up: int) -> Took:
        """Returns the time per step, after ``warm_up`` steps."""
        if self.run is None:
            self.run = captured(self.step) if self.device == "cuda" else self.step
        for _ in range(warm_up):
            self.run()
        return timed(self.run, self.device, number)

    def parts(self) -> dict[str, Callable[[], None]]:
        """Returns the parts of a step, each of which can run separately."""
        network = self.network
        with torch.no_grad(), autocast(self.device, self.precision):
            features, (_, semantic) = self.tower(), self.text()
            tokens = pool(network.clip.pool, features)[1:]

        def pooled() -> None:
            with autocast(self.device, self.precision):
                found = pool(network.clip.pool, features)
            torch.stack([part.float().sum() for part in found]).sum().backward()

        def encode() -> None:
            torch.stack([part.float().sum() for part in self.text()]).sum().backward()

        def decoded() -> None:
            leaves = [x.detach().requires_grad_() for x in (semantic, *tokens)]
            with autocast(self.device, self.precision):
                found = decode(network.decoder, leaves[0].to(tokens[0].dtype), *leaves[1:])
            found.float().sum().backward()

        return {"image tower": self.tower, "attention pool": pooled, "text tower": encode, "decoder": decoded}


def captured(function: Callable[[], None]) -> Callable[[], None]:
    """Captures a function as a CUDA graph. If this fails, returns the function itself."""
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
    except RuntimeError as error:
        warnings.warn(f"The floor is measured without a captured graph: {error}", stacklevel=2)
        return function
    return graph.replay
