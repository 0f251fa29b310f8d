from .alternating import Alternating, set_epoch
from .schedule import PhaseSchedule
