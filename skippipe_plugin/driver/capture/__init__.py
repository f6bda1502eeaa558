"""What the driver shows user code of blocks that live elsewhere, and how it runs that code around them."""
