from .alternating import Alternating, live, set_epoch
from .schedule import PhaseSchedule
