"""Ids to ids: one compiled token loop, what shapes its logits, beams beside it."""
