"""Prompts with learnable context words before each class name (CoOp, Zhou et al.; paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cbsa_lightning.errors import ConfigError

if TYPE_CHECKING:
    from cbsa_lightning.clip import FrozenCLIP


class ClassPrompts(nn.Module):
    """One prompt per class: ``[start] v_1 ... v_N class-name . [end]``, with learnable ``v``.

    Prompts are truncated after the longest end token. This is exact, because the text tower is causal and its output is
    read at the end token, so later tokens have no effect.

    Args:
        clip: Provides the tokenizer and the frozen word embeddings.
        names: The C class names to use in prompts.
        length: N, the number of learnable words.
        shared: Whether all classes share one set of words ``(N, w)``. Otherwise, each has its own set, ``(C, N, w)``.
        template: Initial words such as "a photo of a", which determine N. If None, they are initialized with noise.
        trainable: Whether the words are trained.

    Raises:
        ConfigError: If a class name is too long for the text tower, or a fixed prompt has no template.
    """

    prefix: Tensor
    suffix: Tensor
    end: Tensor

    def __init__(
        self,
        clip: FrozenCLIP,
        names: Sequence[str],
        length: int = 16,
        shared: bool = False,
        template: str | None = None,
        trainable: bool = True,
    ) -> None:
        super().__init__()
        self.shared = shared
        if template is None and not trainable:
            raise ConfigError("Fixed prompts require a template: give a prompt template, for example 'a photo of a'.")
        if template is not None:
            length = int(clip.eot(clip.tokenize([template]))) - 1
        if length < 1:
            raise ConfigError(f"A prompt must have at least one word before the class name, got {length}.")
        tokens = self._tokens(clip, names, length, template)
        end = clip.eot(tokens)
        with torch.no_grad():
            embeddings = clip.embed_tokens(tokens[:, : int(end.max()) + 1])
        # Checkpoints exclude these buffers, because they depend only on the class names and the frozen embeddings.
        self.register_buffer("prefix", embeddings[:, :1], persistent=False)
        self.register_buffer("suffix", embeddings[:, 1 + length :], persistent=False)
        self.register_buffer("end", end, persistent=False)

        shape = (length, clip.text_width) if shared else (len(names), length, clip.text_width)
        if template is None:
            words = torch.empty(shape).normal_(std=0.02)  # CoOp's initialization
        else:
            words = embeddings[0, 1 : 1 + length].float().expand(shape).clone()
        self.words = nn.Parameter(words, requires_grad=trainable)

    @staticmethod
    def _tokens(clip: FrozenCLIP, names: Sequence[str], length: int, template: str | None) -> Tensor:
        # A truncated text also ends with an end token, so the length of the class name must be checked.
        room = clip.context_length - length - 3  # start token, full stop, end token
        used = clip.eot(clip.tokenize(list(names))) - 1
        for name, count in zip(names, used.tolist(), strict=True):
            if count > room:
                raise ConfigError(
                    f"Class name '{name}' has {count} tokens or more, but {length} prompt words leave room for "
                    f"{room} of the {clip.context_length} tokens of the text tower. Give it a shorter prompt name in "
                    "the class file, or use fewer prompt words."
                )
        words = template if template is not None else " ".join(["X"] * length)
        return clip.tokenize([f"{words} {name}." for name in names])

    def parts(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Returns the input of the text tower.

        Returns:
            The common beginning ``(1, S, w)`` of the prompts, which is the start token and shared words, or None if it
            is not encoded separately; the rest of each prompt ``(C, L, w)``; and the position ``(C,)`` of the end token
            in the rest.
        """
        words = self.words.to(self.prefix.dtype)
        if words.dim() == 2:
            start = torch.cat([self.prefix[:1], words[None]], dim=1)
            return start, self.suffix, self.end - start.shape[1]
        if words.device.type == "cpu":  # elsewhere, the additional operations take longer than a token of each prompt
            return self.prefix[:1], torch.cat([words, self.suffix], dim=1), self.end - 1
        return None, torch.cat([self.prefix, words, self.suffix], dim=1), self.end

    def forward(self) -> tuple[Tensor, Tensor]:
        """Returns prompt embeddings ``(C, L, w)`` and the position of each end token ``(C,)``."""
        start, rest, _ = self.parts()
        return rest if start is None else torch.cat([start.expand(len(rest), -1, -1), rest], dim=1), self.end


def encode_prompt_sets(clip: FrozenCLIP, sets: Sequence[ClassPrompts]) -> list[Tensor]:
    """Encodes several prompt sets for the same C classes. Returns a list of text features ``(C, d)``.

    All sets are encoded in one pass through the text tower, unless their common beginnings have different lengths.
    """
    starts, rests, ends = zip(*(prompts.parts() for prompts in sets), strict=True)
    if len({None if start is None else start.shape[1] for start in starts}) > 1:
        return [encode_prompt_sets(clip, [prompts])[0] for prompts in sets]
    longest = max(rest.shape[1] for rest in rests)
    padded = torch.cat([nn.functional.pad(rest, (0, 0, 0, longest - rest.shape[1])) for rest in rests])
    prefix = None if starts[0] is None else torch.cat(starts)
    features = clip.encode_prompts(padded, torch.cat(ends), prefix)
    return list(torch.split(features, [len(rest) for rest in rests]))
