"""reftune: representation finetuning (ReFT) of language models, as a PEFT method.

Importing this package registers the method with PEFT.
"""

from reftune.config import ReftConfig
from reftune.context import options
from reftune.controls import reft_layers, set_composition, set_strength, set_subspaces
from reftune.errors import (
    AdapterMismatchError,
    ConversionError,
    DataError,
    LayersNotFoundError,
    MergeError,
    PositionError,
    ReftConfigError,
    ReftuneError,
    RunError,
)
from reftune.interventions import METHODS, Intervention
from reftune.positions import Positions
from reftune.together import add_reft, load_reft
from reftune.tuner import ReftModel

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AdapterMismatchError",
    "ConversionError",
    "DataError",
    "Intervention",
    "LayersNotFoundError",
    "MergeError",
    "PositionError",
    "Positions",
    "ReftConfig",
    "ReftConfigError",
    "ReftModel",
    "ReftuneError",
    "RunError",
    "__version__",
    "add_reft",
    "load_reft",
    "options",
    "reft_layers",
    "set_composition",
    "set_strength",
    "set_subspaces",
]
