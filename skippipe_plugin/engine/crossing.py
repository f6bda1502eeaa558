"""What crosses the boundaries between stages: hidden states, and what else blocks pass on to others."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from .arguments import versions
from .call import Hop, Made, made_before
from .errors import SkipPipeError
from .transport import TensorSpec

Tensors = tuple[Tensor, ...]
"""What crosses a boundary: the hidden states, and what else blocks pass on, in the order of a hop."""
Gradients = tuple[Tensor | None, ...]
"""Of those; None where nothing depended on one, and empty where nothing depended on any."""


class Kept(dict[Made, Tensor]):
    """The tensors that a stage's blocks return, or get, and that are needed again."""

    def __init__(self, wanted: Collection[Made]) -> None:
        super().__init__()
        self._wanted = wanted
        self._versions: dict[Made, int] = {}

    def note(self, block: int, tensors: Sequence[Tensor]) -> None:
        """Keep what is wanted of what a block has returned."""
        for number, tensor in enumerate(tensors):
            if (made := Made(block, number)) in self._wanted:
                self._keep(made, tensor)

    def note_entering(self, block: int, enters: Hop, tensors: Sequence[Tensor]) -> None:
        """Keep what enters the stage whose first block that is; the hidden states may be needed further behind, too."""
        names = (Made(block - 1, 0), *(made_before(block, each) for each in enters.beside))
        for made, tensor in zip(names, tensors, strict=True):
            self._keep(made, tensor)

    def _keep(self, made: Made, tensor: Tensor) -> None:
        self[made] = tensor
        self._versions[made] = versions([tensor])[0]

    def check(self) -> None:
        """Raise when one of them was changed in place since."""
        changed = [made for made, tensor in self.items() if versions([tensor])[0] != self._versions[made]]
        if changed:
            raise SkipPipeError(
                f"what block {changed[0].block} has returned is needed again, by a block behind the next one or by the "
                "code after the blocks, and a block between them changes it in place, which others do not see. Let it "
                "make a new tensor (x = x + y in place of x += y)"
            )


def leaves_of(entering: Tensors, enters: Hop) -> Tensors:
    """Return leaves of what enters a stage, to collect its gradients."""
    hidden = entering[0].detach().requires_grad_(enters.requires_grad)
    if not enters.beside:
        return (hidden,)
    pairs = zip(entering[1:], enters.beside, strict=True)
    return (hidden, *(tensor.detach().requires_grad_(each.requires_grad) for tensor, each in pairs))


def check_outputs(stage: int, outputs: Tensors, leaves: Hop) -> None:
    """Raise where what leaves a stage has another form than was said."""
    for output, spec in zip(outputs, leaves.there, strict=True):
        if output.shape != spec.shape or output.dtype != spec.dtype:
            raise SkipPipeError(
                f"stage {stage} was expected to return {spec} but returned {TensorSpec.of(output)}: its blocks "
                "change the form of the hidden states in a way that depends on the data, or on a key-value cache "
                "(T5's bias of positions). Let them keep it; generate with use_cache=False"
            )
