"""The byte-level language model with a mixture of experts in every block.

Only the feed-forward layer differs from `byte_lm.py`. The experts are spread and balanced by `train_moe.py`; nothing
here knows about pipelines.
"""

from byte_lm import Block, ByteLM
from torch import nn

from skippipe_plugin.moe import MoELayer


class MoEBlock(Block):
    """A block whose feed-forward layer is a mixture of experts."""

    def __init__(self, width: int, num_heads: int, num_experts: int, top_k: int, router: str) -> None:
        super().__init__(width, num_heads)
        # Together the chosen experts are as wide as the layer they replace.
        self.mlp: nn.Module = MoELayer(width, 4 * width // top_k, num_experts, top_k=top_k, router=router)


class ByteMoE(ByteLM):
    """Predict the next byte, with a few of many experts for each."""

    def __init__(
        self,
        width: int = 96,
        num_layers: int = 6,
        context: int = 64,
        lr: float = 5e-3,
        num_experts: int = 8,
        top_k: int = 2,
        router: str = "sigmoid",
    ) -> None:
        super().__init__(width, num_layers, context, lr)
        self.save_hyperparameters()
        blocks = (MoEBlock(width, width // 32, num_experts, top_k, router) for _ in range(num_layers))
        self.blocks = nn.ModuleList(blocks)
