"""Measuring: the machine's limits, this package and its peers, by one method that can be read.

`sides/` holds scripts, not modules: each is one thing to be measured, runs in a process of its own and prints a JSON
object. Those of the peers, whose packages gemmakit never imports, are in benchmarks/peers of the repository.
"""
