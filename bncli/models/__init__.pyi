from .configured import build_configured as build_configured
from .convnet import ConvNet as ConvNet
from .convnet import build_model as build_model
from .named import build_network as build_network
from .normalized import normalize_input as normalize_input
