"""Run a schedule on torch.distributed: transports, actions, generations, control channels."""
