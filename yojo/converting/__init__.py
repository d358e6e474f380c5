"""Reward models of one kind made into another: merged, and from and to the files of other tools."""
