"""Messages of scripts, by Python's own `logging`, under the logger "minidiff".

minidiff's own messages are Python warnings and exceptions: `warnings.filterwarnings` silences the former,
`pipe.set_progress_bar_config(disable=True)` the bar of a pipeline.
"""

import logging
from logging import CRITICAL, DEBUG, ERROR, FATAL, INFO, NOTSET, WARN, WARNING

from ..missing import getter

__all__ = [
    "CRITICAL",
    "DEBUG",
    "ERROR",
    "FATAL",
    "INFO",
    "NOTSET",
    "WARN",
    "WARNING",
    "add_handler",
    "disable_default_handler",
    "disable_progress_bar",
    "disable_propagation",
    "enable_default_handler",
    "enable_explicit_format",
    "enable_progress_bar",
    "enable_propagation",
    "get_logger",
    "get_verbosity",
    "is_progress_bar_enabled",
    "remove_handler",
    "reset_format",
    "set_verbosity",
    "set_verbosity_debug",
    "set_verbosity_error",
    "set_verbosity_info",
    "set_verbosity_warning",
]
__getattr__ = getter(__name__, __all__)

ROOT = logging.getLogger("minidiff")
HANDLER = logging.StreamHandler()  # to stderr


def get_logger(name: str | None = None) -> logging.Logger:
    """Python's logger of that name; "minidiff" is the one above all of the package's."""
    return logging.getLogger(name or ROOT.name)


def get_verbosity() -> int:
    """The level from which on messages are shown: `WARNING` (30) at first."""
    return ROOT.getEffectiveLevel()


def set_verbosity(verbosity: int) -> None:
    ROOT.setLevel(verbosity)


def set_verbosity_debug() -> None:
    set_verbosity(DEBUG)


def set_verbosity_info() -> None:
    set_verbosity(INFO)


def set_verbosity_warning() -> None:
    set_verbosity(WARNING)


def set_verbosity_error() -> None:
    set_verbosity(ERROR)


def enable_default_handler() -> None:
    """Messages go to stderr, as they do at first."""
    ROOT.addHandler(HANDLER)


def disable_default_handler() -> None:
    ROOT.removeHandler(HANDLER)


def add_handler(handler: logging.Handler) -> None:
    ROOT.addHandler(handler)


def remove_handler(handler: logging.Handler) -> None:
    ROOT.removeHandler(handler)


def enable_propagation() -> None:
    """Messages go to the handlers of Python's root logger too; at first they don't."""
    ROOT.propagate = True


def disable_propagation() -> None:
    ROOT.propagate = False


def enable_explicit_format() -> None:
    """Each message with its level, file, line and time."""
    HANDLER.setFormatter(logging.Formatter("[%(levelname)s|%(filename)s:%(lineno)s] %(asctime)s >> %(message)s"))


def reset_format() -> None:
    """Each message alone."""
    HANDLER.setFormatter(None)


def disable_progress_bar() -> None:
    """Hides the bars of downloads, which are huggingface_hub's. Loading has none."""
    from huggingface_hub.utils import disable_progress_bars  # takes its time

    disable_progress_bars()


def enable_progress_bar() -> None:
    """Shows the bars of downloads."""
    from huggingface_hub.utils import enable_progress_bars

    enable_progress_bars()


def is_progress_bar_enabled() -> bool:
    """Whether downloads show bars."""
    from huggingface_hub.utils import are_progress_bars_disabled

    return not are_progress_bars_disabled()


enable_default_handler()
disable_propagation()
set_verbosity_warning()
