"""A loop for Hugging Face accelerate that trains a language model over bytes, in one process or as a pipeline.

python examples/accelerate_lm.py            # a driver and three workers, about a minute on two cores
python examples/accelerate_lm.py --plain    # the very same loop with Accelerator()
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import GPT2Config, GPT2LMHeadModel

CONTEXT = 64


class Windows(Dataset[dict[str, Tensor]]):
    """A text in windows of bytes, each byte to be predicted from those before it."""

    def __init__(self, text: bytes) -> None:
        self.windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: len(text) // CONTEXT * CONTEXT]
        self.windows = self.windows.view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true", help="train in one process, with Accelerator()")
    parser.add_argument("--text", metavar="FILE", help="text to learn (default: torch's own optimizer code)")
    parser.add_argument("--skip-ratio", type=float, default=0.0, help="share of stages that each microbatch leaves out")
    parser.add_argument("--num-stages", type=int, default=3, help="workers, each with its share of the layers")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 4")
    parser.add_argument("--output", default="checkpoint", help="folder for the checkpoint")
    return parser.parse_args()


def accelerator_for(arguments: argparse.Namespace) -> Accelerator:
    """Make the accelerator: the only line that differs between one process and a pipeline."""
    if arguments.plain:
        return Accelerator(cpu=True)
    from skippipe_plugin.accelerate import SkipPipeAccelerator

    return SkipPipeAccelerator(cpu=True, num_stages=arguments.num_stages, skip_ratio=arguments.skip_ratio)


def build_model(arguments: argparse.Namespace) -> GPT2LMHeadModel:
    sizes = {"n_layer": arguments.layers, "n_embd": arguments.width, "n_head": 4}
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=256, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0, **sizes, **dropouts)
    )


def text_of(arguments: argparse.Namespace) -> bytes:
    if arguments.text:
        return Path(arguments.text).read_bytes()
    return b"".join(file.read_bytes() for file in sorted(Path(torch.optim.__file__).parent.glob("*.py")))


@torch.no_grad()
def validation_loss(accelerator: Accelerator, model: GPT2LMHeadModel, loader: DataLoader) -> float:
    model.eval()
    losses = [accelerator.gather_for_metrics(model(**batch).loss) for batch in loader]
    model.train()
    return float(torch.stack(losses).mean())


def main() -> None:
    arguments = parse_arguments()
    accelerator = accelerator_for(arguments)
    set_seed(0)
    text = text_of(arguments)
    train = DataLoader(Windows(text[: len(text) * 9 // 10]), batch_size=16, shuffle=True, drop_last=True)
    held_out = DataLoader(Windows(text[len(text) * 9 // 10 :][: 160 * CONTEXT]), batch_size=16)
    model = build_model(arguments)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, arguments.steps)
    model, optimizer, train, held_out, scheduler = accelerator.prepare(model, optimizer, train, held_out, scheduler)

    start, step = time.perf_counter(), 0
    model.train()
    while step < arguments.steps:
        for batch in train:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
            if step % 25 == 0:
                accelerator.print(f"step {step:4d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s")
            if step == arguments.steps:
                break

    accelerator.print(f"validation loss: {validation_loss(accelerator, model, held_out):.4f} nats per byte")
    accelerator.save_state(arguments.output)
    accelerator.print(f"checkpoint, of the same form either way: {arguments.output}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
