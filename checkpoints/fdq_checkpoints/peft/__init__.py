"""Adapters in and out, as PEFT saves them: adapter_config.json, adapter_model.safetensors."""
