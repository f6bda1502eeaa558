"""Train the byte-level language model of `byte_lm.py` as a configuration file says; there is nothing of ours in here.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --trainer.devices=1 --trainer.strategy=auto   # in one process
python examples/cli.py fit --help
"""

from byte_lm import ByteData, ByteLM
from lightning.pytorch.cli import LightningCLI

if __name__ == "__main__":
    LightningCLI(ByteLM, ByteData)
