"""Small models of the kinds that people write, each in a few lines: the registry of `docs/architectures.md`."""

from zoo_dynamics import CONTROL_FLOW, DYNAMICS
from zoo_fields import IMAGE_MODELS, PERCEPTRONS
from zoo_layers import Models
from zoo_modules import MODULES
from zoo_sequences import SEQUENCE_MODELS, SETS_AND_GRAPHS

ZOO: dict[str, Models] = {
    "Perceptrons and fields": PERCEPTRONS,
    "Images": IMAGE_MODELS,
    "Sequences": SEQUENCE_MODELS,
    "Sets and graphs": SETS_AND_GRAPHS,
    "Dynamics, derivatives and densities": DYNAMICS,
    "Control flow and derivatives of one's own": CONTROL_FLOW,
    "Modules": MODULES,
}
