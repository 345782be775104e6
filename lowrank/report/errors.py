"""Errors that a command reports in one line, with its exit status."""


class ReportError(RuntimeError):
    """Report that results or the site could not be made."""

    exit_status = 2


class NotebookError(ReportError):
    """Report that a notebook failed before its last cell."""

    exit_status = 1


class ParameterError(ValueError):
    """Report a set, a notebook or a parameter that breaks a rule."""
