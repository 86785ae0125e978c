"""One module per stage of dvc.yaml: `python -m stages.<name> PATHS...`, run in a profile's folder."""

import os
import warnings

# Two threads that spin while they wait for each other stand still when another process wants a core (seen: 8 times
# slower). Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# compressai compiles two functions with torch.jit.script while it is imported; nothing a user of it could change.
warnings.filterwarnings("ignore", message=r".*torch\.jit\.script.*", category=FutureWarning)
