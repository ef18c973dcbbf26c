"""Devices made of devices: expressions that name them, and what runs a graph on several."""
