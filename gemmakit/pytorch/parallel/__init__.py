"""One model over several processes: tensor parallel, fully sharded, and checkpoints of both. Nothing here is loaded
before it is needed: torch's own modules for it take a second to import.
"""
