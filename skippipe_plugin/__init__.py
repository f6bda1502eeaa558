"""Train a deep model over unequal, unreliable machines without touching its LightningModule."""
