"""Ids to ids: one token loop, what shapes its logits, what ends it."""
