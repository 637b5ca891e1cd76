"""Where the project is, and where the tests marked gpu run. PyTorch is not imported here."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GPU = os.environ.get("GPU_TESTS_ON") or "cuda"
