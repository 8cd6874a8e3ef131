"""From results to model cards: records, pages, checks, reproduction. Only making and reproducing import torch."""

from .checks import check
from .making import make
from .page import build_card, build_index
from .record import load_record
from .repeating import Repetition, reproduce

__all__ = ["Repetition", "build_card", "build_index", "check", "load_record", "make", "reproduce"]
