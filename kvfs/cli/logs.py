"""Where the log of a service goes, and how its lines look.

Layer: L5.

- text, for people: level, logger, message. json, for collectors: one object per line with `time`
  (RFC 3339, UTC), `level`, `logger`, `message`, and where there are some `fields` (what the caller
  gave as `extra`) and `exception` (a traceback).
- In the foreground to stderr; else to a file, which is opened again once it has been moved away
  (logrotate needs no signal), or to the system's log.
"""

import json
import logging
import logging.handlers
import os
import sys
from datetime import UTC, datetime
from typing import Final

FORMATS: Final = ("text", "json")
_SYSTEM_LOG: Final = "/dev/log"
_STANDARD: Final = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object per record, in one line of ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = {name: value for name, value in vars(record).items() if name not in _STANDARD}
        if fields:
            line["fields"] = fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def start_logging(
    path: str, log_format: str, *, is_foreground: bool, is_verbose: bool = False
) -> None:
    """Send the log of this process where a service's log goes.

    Args:
        path: A file; empty for stderr in the foreground, else for the system's log if there is one.
        log_format: One of FORMATS.
        is_foreground: Whether anybody reads stderr.
        is_verbose: Log what is of interest to those who look for a bug, too.
    """
    handler: logging.Handler
    text = "%(levelname)s %(name)s %(message)s"
    if path:
        handler = logging.handlers.WatchedFileHandler(path)
        text = f"%(asctime)s {text}"
    elif is_foreground:
        handler = logging.StreamHandler(sys.stderr)
    elif os.path.exists(_SYSTEM_LOG):
        handler = logging.handlers.SysLogHandler(_SYSTEM_LOG)
        handler.ident = f"kvfs[{os.getpid()}]: "
        text = "%(levelname)s %(message)s"
    else:
        return
    handler.setFormatter(JsonFormatter() if log_format == "json" else logging.Formatter(text))
    logging.getLogger().addHandler(handler)
    logging.getLogger("kvfs").setLevel(logging.DEBUG if is_verbose else logging.INFO)
