from .content import Content as Content
from .content import Fact as Fact
from .content import Training as Training
from .library import DrawingLibrary as DrawingLibrary
from .measurement import Measurement as Measurement
from .measurement import measure as measure
from .page import render_page as render_page
