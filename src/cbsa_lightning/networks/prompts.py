"""Learnable prompts: the context words in front of each class name (Zhou et al., CoOp; paper section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cbsa_lightning.clip import FrozenCLIP
from cbsa_lightning.errors import ConfigError


class ClassPrompts(nn.Module):
    """One prompt a class: ``[start] v_1 ... v_N class-name . [end]``, with ``v`` learnable.

    Prompts are cut behind the longest end token. The text tower is causal and is read at the end token, so what
    stands behind it can change nothing, and leaving it out is exact.

    Args:
        clip: Gives the tokeniser and the frozen word embeddings.
        names: The C class names, as they are to be read.
        length: N, number of learnable words.
        shared: One set of words for all classes, ``(N, w)``, instead of one set a class, ``(C, N, w)``.
        template: Start from these words ("a photo of a") instead of from noise; they then fix N.
        trainable: False keeps the words as they start.

    Raises:
        ConfigError: If a class name does not fit into the text tower, or a fixed prompt has no template.
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
        if template is None and not trainable:
            raise ConfigError("Fixed prompts need words: give a prompt template, for example 'a photo of a'.")
        if template is not None:
            length = int(clip.eot(clip.tokenize([template]))) - 1
        if length < 1:
            raise ConfigError(f"A prompt needs at least one word in front of the class name, got {length}.")
        tokens = self._tokens(clip, names, length, template)
        end = clip.eot(tokens)
        with torch.no_grad():
            embeddings = clip.embed_tokens(tokens[:, : int(end.max()) + 1])
        # Derived from the class names and the frozen table, so not part of a checkpoint.
        self.register_buffer("prefix", embeddings[:, :1], persistent=False)
        self.register_buffer("suffix", embeddings[:, 1 + length :], persistent=False)
        self.register_buffer("end", end, persistent=False)

        shape = (length, clip.text_width) if shared else (len(names), length, clip.text_width)
        if template is None:
            words = torch.empty(shape).normal_(std=0.02)  # CoOp's initialisation
        else:
            words = embeddings[0, 1 : 1 + length].float().expand(shape).clone()
        self.words = nn.Parameter(words, requires_grad=trainable)

    @staticmethod
    def _tokens(clip: FrozenCLIP, names: Sequence[str], length: int, template: str | None) -> Tensor:
        # A cut text still ends in an end token, so the room is checked on the name alone, which must be whole.
        room = clip.context_length - length - 3  # start, full stop, end
        used = clip.eot(clip.tokenize(list(names))) - 1
        for name, count in zip(names, used.tolist(), strict=True):
            if count > room:
                raise ConfigError(
                    f"Class name '{name}' takes {count} tokens or more, but {length} prompt words leave room for "
                    f"{room} of the {clip.context_length} that the text tower reads. Give it a shorter prompt name in "
                    "the class file, or use fewer prompt words."
                )
        words = template if template is not None else " ".join(["X"] * length)
        return clip.tokenize([f"{words} {name}." for name in names])

    def forward(self) -> tuple[Tensor, Tensor]:
        """Gives prompt embeddings ``(C, L, w)`` and the position of each end token ``(C,)``."""
        words = self.words.to(self.prefix.dtype)
        if words.dim() == 2:
            words = words.expand(len(self.prefix), -1, -1)
        return torch.cat([self.prefix, words, self.suffix], dim=1), self.end


def encode_prompt_sets(clip: FrozenCLIP, sets: Sequence[ClassPrompts]) -> list[Tensor]:
    """Text features of several prompt sets in one pass of the text tower: a list of ``(C, d)``."""
    embeddings, ends = zip(*(prompts() for prompts in sets), strict=True)
    longest = max(e.shape[1] for e in embeddings)
    padded = [nn.functional.pad(e, (0, 0, 0, longest - e.shape[1])) for e in embeddings]
    features = clip.encode_prompts(torch.cat(padded), torch.cat(ends))
    return list(torch.split(features, [len(e) for e in embeddings]))
