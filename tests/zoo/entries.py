"""The zoo: models as people have them, each with its data and how it is given to the strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from tests.e2e.modules import loader

from . import modules, networks, pretrained
from .modules import Batch


@dataclass(frozen=True)
class Entry:
    """One model, and how it is trained."""

    make: Callable[[], LightningModule]
    data: Callable[[int], Batch]
    blocks: str | Sequence[str] | None = None
    """As the strategy takes it; None where it finds the stack itself."""
    callbacks: Callable[[], list[Callback]] = list
    collate: Callable[[Sequence[Batch]], Batch] | None = None
    trees: bool = False
    """Whether its blocks return more than a tensor."""
    visits_all: bool = False
    """Whether what each block makes is used elsewhere too, so that no stage can be skipped. Where the first block makes
    what the others get, or the last one returns it as something else, their stages cannot."""

    def can_skip(self, num_stages: int) -> bool:
        """Whether a third of so many stages, rounded, may be skipped."""
        is_one_stack = self.blocks is None or isinstance(self.blocks, str)  # what follows paths knows no code between
        return num_stages > (3 if self.trees else 1) and not self.visits_all and is_one_stack

    def loader(self, samples: int, batch_size: int) -> DataLoader[Any]:
        """Load batches of the first so many samples."""
        return loader(self.data(samples), batch_size, collate_fn=self.collate)


_T5: Final = ("model.encoder.block", "model.decoder.block")
_BART: Final = ("model.model.encoder.layers", "model.model.decoder.layers")
_TRANSFORMER: Final = ("model.transformer.encoder.layers", "model.transformer.decoder.layers")
_CLIP: Final = ("model.vision_model.encoder.layers", "model.text_model.encoder.layers")
_LLAVA: Final = ("model.model.vision_tower.encoder.layers", "model.model.language_model.layers")


def _ema() -> list[Callback]:
    return [EMAWeightAveraging(decay=0.9)]


ZOO: Final[Mapping[str, Entry]] = {
    "t5": Entry(lambda: modules.Task(pretrained.t5()), modules.translations, trees=True),
    "t5 encoder": Entry(lambda: modules.Task(pretrained.t5()), modules.translations, "model.encoder.block", trees=True),
    "bart": Entry(lambda: modules.Task(pretrained.bart()), modules.translations),
    "bart encoder": Entry(lambda: modules.Task(pretrained.bart()), modules.translations, "model.model.encoder.layers"),
    "whisper": Entry(lambda: modules.Task(pretrained.whisper()), modules.speech),
    "whisper encoder": Entry(lambda: modules.Task(pretrained.whisper()), modules.speech, "model.model.encoder.layers"),
    "nn.Transformer": Entry(lambda: modules.Translation(networks.EncoderDecoder()), modules.pairs),
    "nn.Transformer encoder": Entry(
        lambda: modules.Translation(networks.EncoderDecoder()), modules.pairs, "model.transformer.encoder.layers"
    ),
    "clip": Entry(lambda: modules.Contrastive(pretrained.clip()), modules.captions),
    "clip text": Entry(
        lambda: modules.Contrastive(pretrained.clip()), modules.captions, "model.text_model.encoder.layers"
    ),
    "t5 both": Entry(lambda: modules.Task(pretrained.t5()), modules.translations, _T5, trees=True),
    "bart both": Entry(lambda: modules.Task(pretrained.bart()), modules.translations, _BART),
    "whisper both": Entry(lambda: modules.Task(pretrained.whisper()), modules.speech, _BART),
    "nn.Transformer both": Entry(lambda: modules.Translation(networks.EncoderDecoder()), modules.pairs, _TRANSFORMER),
    "clip both": Entry(lambda: modules.Contrastive(pretrained.clip()), modules.captions, _CLIP),
    "llava both": Entry(lambda: modules.Task(pretrained.llava()), modules.conversations, _LLAVA),
    "llava": Entry(lambda: modules.Task(pretrained.llava()), modules.conversations),
    "qwen2-vl": Entry(
        lambda: modules.Task(pretrained.qwen2_vl()),
        modules.grids,
        collate=modules.in_one_row,
    ),
    "dit": Entry(lambda: modules.Diffusion(networks.DiT()), modules.patches, callbacks=_ema),
    "u-net": Entry(lambda: modules.Reconstruction(networks.UNet()), modules.images),
    "u-vit": Entry(lambda: modules.Reconstruction(networks.UViT()), modules.rows, visits_all=True),
    "albert": Entry(lambda: modules.Task(pretrained.albert()), modules.masked),
    "two streams": Entry(lambda: modules.NextToken(networks.TwoStreams()), modules.text, trees=True),
    "detr": Entry(lambda: modules.Detection(networks.DeepHeads()), modules.objects, visits_all=True),
    "dpo": Entry(lambda: modules.Preference(pretrained.llama()), modules.answers, "model.model.layers"),
    "distillation": Entry(
        lambda: modules.Distillation(pretrained.llama(), pretrained.llama()), modules.prompts, "model.model.layers"
    ),
    "gan": Entry(modules.Gan, modules.points),
    "lora over bart": Entry(lambda: modules.Task(pretrained.with_lora(pretrained.bart())), modules.translations),
    "lora over llava": Entry(lambda: modules.Task(pretrained.with_lora(pretrained.llava())), modules.conversations),
    "dpo with adapters": Entry(
        lambda: modules.AdapterPreference(pretrained.with_lora(pretrained.llama())), modules.answers
    ),
}
