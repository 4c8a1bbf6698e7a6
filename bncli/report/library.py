"""The drawing library that goes into the page: Vega, Vega-Lite and Vega-Embed as one script (BSD-3-Clause).

The package vl-convert-python carries their sources and bundles them without a network, which takes 1 to 3
seconds. It does so without Python's lock: so it is begun first, in a thread, and is mostly done when the
checkpoint is read. About 900 kB; Plotly's smallest bundle that draws all of these figures, and Bokeh's, are
larger, and neither draws SVG that follows the page's colours.
"""

import re
import threading
from functools import cache
from importlib.util import find_spec

from bncli.errors import BncliError


class DrawingLibrary:
    """The script, being made from the moment that this is created."""

    def __init__(self) -> None:
        """Raises BncliError where the package is missing."""
        if find_spec("vl_convert") is None:
            raise BncliError('a report needs vl-convert-python, which draws it: pip install "bncli[report]"')
        self._script = ""
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._make, name="drawing library", daemon=True)
        self._thread.start()

    def script(self) -> str:
        """Wait for it. What could end the element <script> early is not in it.

        Raises BncliError when it could not be made.
        """
        self._thread.join()
        if self._error is not None:
            raise BncliError(f"vl-convert-python cannot bundle the drawing library: {self._error}")
        return self._script

    def _make(self) -> None:
        try:
            self._script = _bundled()
        except Exception as error:  # whatever the thread meets is told where the script is asked for
            self._error = error


@cache
def _bundled() -> str:
    """The same for every page that this process writes."""
    import vl_convert

    # inside JavaScript's strings, where alone it can be, \/ is /
    return re.sub(r"(?i)</(?=script)", r"<\\/", vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
