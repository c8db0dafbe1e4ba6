"""Ids to ids: one step, compiled as a token loop, and beams over its first half."""
