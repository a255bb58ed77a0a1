"""CBSAModule: the paper's method, ready to import."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import AdamW

from cbsa_lightning.arguments import check_flags, check_names, check_number
from cbsa_lightning.errors import ConfigError
from cbsa_lightning.method.context_task import ContextTask
from cbsa_lightning.method.decisions import Objective
from cbsa_lightning.method.labelers import EvidenceLabeler, Labeler
from cbsa_lightning.method.losses import ElementwiseLoss
from cbsa_lightning.networks.cbsa import CBSANetwork, build_cbsa_network
from cbsa_lightning.training.module import SSMLLModule
from cbsa_lightning.training.schedules import SchedulerCallable


class CBSAModule(SSMLLModule):
    """Context-based semantic-aware alignment, with the paper's settings as defaults.

    Where the paper is silent or contradicts itself, the default and its reason stand in ``docs/choices.md``.

    Args:
        class_names: The C class names.
        prompt_names: How prompts spell them; None: as ``class_names``, "_" read as a space.
        clip: open_clip model, folder or configuration file; "embedded" is the small one inside this package.
        pretrained: open_clip weights tag or a file, or "random". Folders bring their own: leave it out.
        semantic_alignment: SAA of Table 3; off, the global image feature is compared with every class.
        target_prompts: TP of Table 3; off, classes are the fixed words "a photo of a ...".
        num_contexts: K; 0 switches context identification (CI of Table 3) off. The paper: 6 on COCO, 2 on VOC and
            NUS-WIDE.
        contexts: Options of context identification.
        prompt_length: N, learnable words a prompt.
        shared_prompts: One set of words for all classes (Table 8).
        prompt_template: Words that prompts start from (Table 6); None starts from noise.
        decoder_layers: Blocks of the label decoder.
        decoder_heads: Attention heads of each block.
        decoder_feedforward: Hidden width of each block.
        decoder_dropout: Dropout rate of each block.
        decoder_self_attention: Whether the classes' queries look at each other.
        scale: Initial factor of the cosine of Eq. 5.
        learn_scale: Whether that factor is learned.
        train_pool: Whether CLIP's attention pool is trained.
        pool_lr_scale: Its factor of the learning rate.
        labeler: Makes pseudo-labels; None: CAT. ``StackedProbes()`` makes safer ones where labels are few,
            ``LabeledOnly()`` trains on the labels alone.
        loss: Element-wise loss; None: ASL(0, 4, 0.05).
        warmup_epochs: Epochs on labeled images only.
        unsup_weight: Factor of the loss on pseudo-labels.
        ema_decay: Decay of the average that makes the pseudo-labels and the reported numbers; None: it looks back over
            a seventh of the second stage's steps, about as 0.9997 does in the paper's VOC runs.
        optimizer: Makes the optimizer from parameter groups.
        scheduler: Makes the schedule of a stage; None: one cycle.
        max_skipped_steps: Steps in a row that may be left out because their loss is not finite; 0: none, it stops.
        stack_share: Share of the labeler's stack in the final scores; above 0 it needs ``StackedProbes()``.
        objective: Chooses the decision thresholds; None: ``Share()``.

    Raises:
        ConfigError: If settings do not fit each other or the towers.
        WeightsError: If the CLIP weights cannot be had.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        prompt_names: Sequence[str] | None = None,
        clip: str = "RN50-quickgelu",
        pretrained: str | None = "openai",
        semantic_alignment: bool = True,
        target_prompts: bool = True,
        num_contexts: int = 6,
        contexts: ContextTask | None = None,
        prompt_length: int = 16,
        shared_prompts: bool = False,
        prompt_template: str | None = None,
        decoder_layers: int = 2,
        decoder_heads: int = 8,
        decoder_feedforward: int = 2048,
        decoder_dropout: float = 0.1,
        decoder_self_attention: bool = True,
        scale: float = 20.0,
        learn_scale: bool = True,
        train_pool: bool = True,
        pool_lr_scale: float = 0.3,
        labeler: Labeler | EvidenceLabeler | None = None,
        loss: ElementwiseLoss | None = None,
        warmup_epochs: int = 8,
        unsup_weight: float = 1.0,
        ema_decay: float | None = 0.9997,
        optimizer: OptimizerCallable = lambda params: AdamW(params, lr=1e-3, weight_decay=1e-4, fused=True),
        scheduler: SchedulerCallable | LRSchedulerCallable | None = None,
        max_skipped_steps: int = 0,
        stack_share: float = 0.0,
        objective: Objective | None = None,
    ) -> None:
        class_names = check_names("class_names", class_names)
        check_number("num_contexts", num_contexts, 0, whole=True)
        for name, value in (
            ("prompt_length", prompt_length),
            ("decoder_layers", decoder_layers),
            ("decoder_heads", decoder_heads),
            ("decoder_feedforward", decoder_feedforward),
        ):
            check_number(name, value, 1, whole=True)
        check_number("decoder_dropout", decoder_dropout, 0, 1)
        check_number("scale", scale, 0)
        check_flags(
            semantic_alignment=semantic_alignment,
            target_prompts=target_prompts,
            shared_prompts=shared_prompts,
            decoder_self_attention=decoder_self_attention,
            learn_scale=learn_scale,
            train_pool=train_pool,
        )
        check_number("pool_lr_scale", pool_lr_scale, 0)
        if num_contexts > len(class_names):
            raise ConfigError(
                f"{num_contexts} contexts cannot be made of {len(class_names)} classes; choose num_contexts <= "
                f"{len(class_names)}, or 0 for none."
            )

        def network(names: Sequence[str]) -> CBSANetwork:
            return build_cbsa_network(
                names,
                clip=clip,
                pretrained=pretrained,
                semantic_alignment=semantic_alignment,
                decoder_layers=decoder_layers,
                decoder_heads=decoder_heads,
                decoder_feedforward=decoder_feedforward,
                decoder_dropout=decoder_dropout,
                decoder_self_attention=decoder_self_attention,
                num_contexts=num_contexts,
                prompt_length=prompt_length,
                shared_prompts=shared_prompts,
                prompt_template=prompt_template,
                target_prompts=target_prompts,
                scale=scale,
                learn_scale=learn_scale,
                train_pool=train_pool,
                pool_lr_scale=pool_lr_scale,
            )

        super().__init__(
            class_names,
            network,
            prompt_names=prompt_names,
            labeler=labeler,
            loss=loss,
            contexts=contexts,
            warmup_epochs=warmup_epochs,
            unsup_weight=unsup_weight,
            ema_decay=ema_decay,
            optimizer=optimizer,
            scheduler=scheduler,
            max_skipped_steps=max_skipped_steps,
            stack_share=stack_share,
            objective=objective,
        )
        # Objects stay out: a checkpoint holds plain types only, so that it loads without running code.
        self.save_hyperparameters(ignore=["contexts", "labeler", "loss", "objective", "optimizer", "scheduler"])
