"""Rows, written down."""

import json

WORDS = ["red", "blue", "green", "white", "black", "gold", "pink", "gray"]


def chat(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
