from .last_words import LastWords as LastWords
from .launch import Launch as Launch
from .launch import launched as launched
from .processes import Processes as Processes
from .processes import processes as processes
from .processes import rank_device as rank_device
from .synchronized import synchronized as synchronized
