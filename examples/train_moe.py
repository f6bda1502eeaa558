"""Train the mixture of experts of `byte_moe.py` as a partial pipeline, its experts balanced without a loss.

python examples/train_moe.py                      # a driver and three workers, about four minutes on two cores
python examples/train_moe.py --skip-ratio 0       # every microbatch visits every stage: the result of one process
python examples/train_moe.py --experts none       # watch the experts and leave them alone
python examples/train_moe.py --expert-parallel 2 --devices 7 --experts all   # every stage's experts on two workers

Draws the loads of all experts over the steps to `expert-loads.png`.
"""

import argparse
from pathlib import Path

from byte_lm import ByteData
from byte_moe import ByteMoE
from lightning.pytorch import Trainer, seed_everything

from skippipe_plugin.callbacks import ExpertConfig, LoadBalancer, draw_loads
from skippipe_plugin.moe import ROUTERS, MoEConfig
from skippipe_plugin.strategies import PathConfig, SkipPipeStrategy

METHODS = {
    "bias": ("bias",),
    "loss": ("loss",),
    "both": ("bias", "loss"),
    "all": ("bias", "loss", "placement"),
    "none": (),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", metavar="FILE", help="text to learn (default: Python's language reference)")
    parser.add_argument("--devices", type=int, default=4, help="processes, the driver included")
    parser.add_argument("--skip-ratio", type=float, default=1 / 3, help="share of stages that every path leaves out")
    parser.add_argument("--expert-parallel", type=int, default=1, help="workers of a stage that share its experts")
    parser.add_argument("--experts", default="bias", choices=METHODS, help="how the experts are balanced")
    parser.add_argument("--rule", default="proportional", help="the rule for the biases: sign or proportional")
    parser.add_argument("--router", default="sigmoid", choices=[*ROUTERS, "cosine"])
    parser.add_argument("--num-experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2, help="experts per token")
    parser.add_argument("--num-microbatches", type=int, default=6, help="slices of each batch")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=96, help="a multiple of 32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default=".", help="folder for logs and the picture")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    seed_everything(arguments.seed)
    model = ByteMoE(
        width=arguments.width,
        num_layers=arguments.layers,
        num_experts=arguments.num_experts,
        top_k=arguments.top_k,
        router=arguments.router,
    )
    data = ByteData(arguments.text, context=model.context, batch_size=arguments.batch_size)
    balancer = LoadBalancer(
        stages=False, experts=METHODS[arguments.experts], expert_config=ExpertConfig(rule=arguments.rule)
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=arguments.devices,
        strategy=SkipPipeStrategy(
            skip_ratio=arguments.skip_ratio,
            num_microbatches=arguments.num_microbatches,
            paths=PathConfig(costs="uniform"),
            replicas=arguments.expert_parallel,
            moe=MoEConfig(expert_parallel=arguments.expert_parallel),
        ),
        max_steps=arguments.steps,
        val_check_interval=max(1, arguments.steps // 4),
        check_val_every_n_epoch=None,  # count steps, not epochs
        limit_val_batches=20,
        num_sanity_val_steps=0,
        log_every_n_steps=10,
        gradient_clip_val=1.0,
        callbacks=[balancer],
        enable_checkpointing=False,
        default_root_dir=arguments.output,
    )
    trainer.fit(model, data)
    metrics = trainer.callback_metrics
    print(f"\nvalidation loss: {metrics['val_loss']:.4f} nats per byte")
    print(f"MaxVio of the last step: {metrics['moe/max_violation']:.3f}")
    print(f"of the blocks' products each token got {metrics['moe/spent_share']:.0%}")
    picture = Path(arguments.output) / "expert-loads.png"
    draw_loads(balancer.experts.shares, picture, title=f"Experts balanced by {arguments.experts}")
    print(f"loads of the experts: {picture}")


if __name__ == "__main__":
    main()
