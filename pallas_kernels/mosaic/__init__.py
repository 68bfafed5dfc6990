"""Launching, lanes and instructions of Mosaic GPU."""
