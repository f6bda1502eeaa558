"""Workers that are lost: found, replaced, and what they held brought back."""
