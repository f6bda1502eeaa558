"""A model whose blocks are spread, and one dialect of its steps: what Lightning, accelerate and plain loops share."""
