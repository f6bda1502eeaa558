"""A program: the text of a small LightningModule with its data and settings, made of features that fill its slots.

Text, because a program that fails is printed whole, and because classes of a user's script travel by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from textwrap import indent
from types import MappingProxyType

TEMPLATE = '''\
import collections, contextlib, copy, dataclasses, functools, io, threading, types
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import grad_norm
from torch import nn
from torch.utils.data import DataLoader, Dataset

{top}

class Block(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.index = index
        {block_parts}
        {block_init}

    def forward(self, h{block_args}):
        {block_pre}
        {block_body}
        {block_post}
        return {block_return}

    {block_methods}


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.note = []  # compared at the end
        {embed}
        {container}
        {head}
        {init}

    def layers(self):
        return {layers}

    def forward(self, x, ids):
        {forward_pre}
        h = {embed_call}
        {after_embed}
        {stack}
        {after_stack}
        return {head_call}

    def compute(self, batch):
        x, ids, y, c = {unpack}
        {step_pre}
        {step_call}
        {loss}
        {terms}
        return loss, out

    def training_step(self, batch, batch_idx):
        {training_pre}
        loss, out = self.compute(batch)
        {logs}
        {training_return}

    def configure_optimizers(self):
        {optimizer}

    {methods}


{data}

TRAINER = dict({trainer})
STRATEGY = dict({strategy})

def after(trainer, module):
    """What is done with the trained module; what it returns is compared too."""
    {after}
    return module.note
'''

LOOP = """\
for index, block in enumerate(self.layers()):
    {loop_pre}
    h = block(h{call_args})
    {loop_post}"""

DATA = """\
class Rows(Dataset):
    def __init__(self, count=20):
        draw = torch.Generator().manual_seed(1)
        self.x = torch.randn(count, 5, 4, generator=draw)
        self.ids = torch.randint(1, 16, (count, 5), generator=draw)
        self.y = self.x.sum((1, 2))[:, None] * 0.2
        # Labels, with an unequal number of -100 in each sample.
        self.c = torch.where(torch.arange(5) <= torch.arange(count)[:, None] * 3 % 5, self.ids % 6, -100)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return {sample}

def loader():
    return DataLoader(Rows({rows}), batch_size={batch_size}{collate})"""

DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "block_parts": "self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)",
        "block_body": "h = h + torch.tanh(self.linear(self.norm(h)))",
        "block_return": "h",
        "embed": "self.embed = nn.Linear(4, 8)",
        "embed_call": "self.embed(x)",
        "container": "self.blocks = nn.ModuleList([Block(i) for i in range(4)])",
        "layers": "list(self.blocks)",
        "stack": LOOP,
        "head": "self.head = nn.Linear(8, 1)",
        "head_call": "self.head(h.mean(1))",
        "unpack": "batch",
        "step_call": "out = self(x, ids)",
        "loss": "loss = F.mse_loss(out, y)",
        "training_return": "return loss",
        "optimizer": "return torch.optim.SGD(self.parameters(), lr=0.002, momentum=0.9)",
        "data": DATA,
        "sample": "self.x[i], self.ids[i], self.y[i], self.c[i]",
        "rows": "20",
        "batch_size": "8",
        "collate": "",
        "precision": '"64-true"',
        "num_microbatches": "4",
        "max_steps": "4",
    }
)
"""Slots that one feature fills, with what they hold otherwise. All other slots collect lines of many features."""

INLINE = (
    *("block_args", "block_return", "layers", "embed_call", "call_args", "head_call", "unpack"),
    *("trainer", "strategy", "sample", "rows", "batch_size", "collate"),
)
"""Slots within a line."""

HOOKS = {
    "on_fit_start": "self",
    "setup": "self, stage",
    "on_train_start": "self",
    "on_train_epoch_start": "self",
    "on_train_batch_start": "self, batch, batch_idx",
    "on_before_zero_grad": "self, optimizer",
    "on_after_backward": "self",
    "on_before_optimizer_step": "self, optimizer",
    "on_train_batch_end": "self, outputs, batch, batch_idx",
    "on_train_epoch_end": "self",
    "on_train_end": "self",
    "on_fit_end": "self",
    "on_save_checkpoint": "self, checkpoint",
    "validation_step": "self, batch, batch_idx",
    "predict_step": "self, batch, batch_idx",
    "configure_gradient_clipping": "self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None",
}
"""Methods of the module that exist only when a feature fills them."""


@dataclass(frozen=True, slots=True)
class Feature:
    """One thing that users do."""

    name: str
    axis: str
    """A program has at most one feature of each axis."""
    kind: str
    """The kind of the promise it tries, as a letter and who knows it best."""
    edits: Mapping[str, str] = field(default_factory=dict)


def conflict(features: Iterable[Feature]) -> bool:
    """Whether two features fill one slot that takes one only, or one asks for a loop that another replaces."""
    filled: set[str] = set()
    for feature in features:
        own = feature.edits.keys() & DEFAULTS.keys()
        if own & filled:
            return True
        filled |= own
    edited = {slot for feature in features for slot in feature.edits}
    replaced = {slot for slot in ("stack", "data") if slot in filled}
    within = {"stack": {"loop_pre", "loop_post", "call_args"}, "data": {"sample", "rows", "batch_size", "collate"}}
    return any(within[slot] & edited for slot in replaced)


def render(features: Iterable[Feature]) -> str:
    """Return the program's text."""
    slots: dict[str, str] = dict(DEFAULTS)
    for feature in features:
        for slot, text in feature.edits.items():
            known = "" if slot in DEFAULTS else slots.get(slot, "")
            if slot in ("block_args", "call_args"):  # what has a name comes last
                slots[slot] = text + known if "=" in known and "=" not in text else known + text
            else:
                slots[slot] = (", " if slot in ("trainer", "strategy") else "\n").join(filter(None, [known, text]))
    trainer = f"precision={slots.pop('precision')}, max_steps={slots.pop('max_steps')}"
    slots["trainer"] = ", ".join(filter(None, [trainer, slots.get("trainer")]))
    microbatches = f"num_microbatches={slots.pop('num_microbatches')}"
    slots["strategy"] = ", ".join(filter(None, [microbatches, slots.get("strategy")]))
    methods = [
        f"def {name}({arguments}):\n{indent(slots[name], '    ')}" for name, arguments in HOOKS.items() if name in slots
    ]
    slots["methods"] = "\n\n".join([*methods, slots.get("methods", "")])
    return fill(fill(TEMPLATE, slots), slots)


def fill(template: str, slots: Mapping[str, str]) -> str:
    """Put the slots' texts in; lines of several keep their slot's indentation, and empty slots leave no line."""
    lines = []
    for line in template.splitlines():
        name = line.strip().removeprefix("{").removesuffix("}")
        if line.strip() == f"{{{name}}}" and name.isidentifier():
            if text := slots.get(name, "").strip("\n"):
                lines.append(indent(text, line[: len(line) - len(line.lstrip())]))
            continue
        for slot in INLINE:
            line = line.replace(f"{{{slot}}}", slots.get(slot, ""))
        lines.append(line)
    return "\n".join(lines) + "\n"
