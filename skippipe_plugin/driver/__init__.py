"""The process that runs the user's script: suspends its step, commands the workers, replaces lost ones."""
