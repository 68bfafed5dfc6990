"""Prompts to tokens: prefill, the decode loop, sampling, text."""
