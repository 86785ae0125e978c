"""One module per stage of dvc.yaml: `python -m stages.<name> PATHS...`, run in a profile's folder."""

import os
import warnings
from pathlib import Path

# Threads that spin long while they wait for each other stand still when another process wants a core (seen: 8 times
# slower); not to spin at all costs 20 % on a quiet machine. Must be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

# Else torch's look for GPUs begins CUDA, which no fork survives.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# compressai compiles two functions with torch.jit.script while it is imported; nothing a user of it could change.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*", category=FutureWarning)

_with_code = warnings.formatwarning


def _format(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Ours are about results, for who runs a stage: one line, without the code that found it."""
    if Path(filename).is_relative_to(Path(__file__).parent):
        return f"Warning: {message}\n"
    return _with_code(message, category, filename, lineno, line)


warnings.formatwarning = _format
