"""Train the byte-level language model of `byte_lm.py`, in one process or as a pipeline.

python examples/train_lm.py                    # a driver and three workers, about two minutes on two cores
python examples/train_lm.py --strategy none    # the very same module in one process
python examples/train_lm.py --text FILE        # learn another text
"""

import argparse

from byte_lm import ByteData, ByteLM
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FILE", help="text to learn (default: Python's language reference)")
    parser.add_argument("--strategy", default="skippipe", help="'skippipe', 'none', or any name that Lightning knows")
    parser.add_argument("--devices", type=int, default=4, help="processes, the driver included")
    parser.add_argument("--schedule", default="auto", help="the pipeline schedule: auto, gpipe or 1f1b")
    parser.add_argument("--num-microbatches", type=int, default=4, help="slices of each batch")
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=".", help="folder for logs and checkpoints")
    return parser.parse_args()


def trainer_for(arguments: argparse.Namespace, checkpoint: ModelCheckpoint) -> Trainer:
    """Build the Trainer: the strategy is all that differs between one process and a pipeline."""
    strategy, devices = arguments.strategy, arguments.devices
    if strategy == "none":
        strategy, devices = "auto", 1
    elif strategy == "skippipe":
        from skippipe_plugin.strategies import SkipPipeStrategy

        strategy = SkipPipeStrategy(schedule=arguments.schedule, num_microbatches=arguments.num_microbatches)
    return Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=arguments.steps,
        val_check_interval=max(1, arguments.steps // 4),
        check_val_every_n_epoch=None,  # count steps, not epochs
        limit_val_batches=20,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        callbacks=[checkpoint],
        default_root_dir=arguments.output,
    )


def main() -> None:
    arguments = parse_arguments()
    seed_everything(arguments.seed)
    model = ByteLM(width=arguments.width, num_layers=arguments.layers)
    data = ByteData(arguments.text, context=model.context, batch_size=arguments.batch_size)
    checkpoint = ModelCheckpoint(monitor="val_loss", filename="{step}-{val_loss:.3f}")
    trainer = trainer_for(arguments, checkpoint)
    trainer.fit(model, data)
    print(f"\nvalidation loss: {trainer.callback_metrics['val_loss']:.4f} nats per byte")
    print(f"best checkpoint: {checkpoint.best_model_path}")
    print(f"a sample:\n{model.generate_text('The ', length=300)}")


if __name__ == "__main__":
    main()
