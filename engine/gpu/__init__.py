"""The engine's step on a device: the host enqueues, the device decides. Nothing here has run on CUDA; see `runner.py`."""
