"""The errors a user can cause. Each message is one sentence: where, what was found, what is allowed, the way out."""

from __future__ import annotations


class RsaftError(Exception):
    """Parent of every error that rsaft raises on purpose; the command line prints it without a traceback."""


class ConfigError(RsaftError, ValueError):
    """A setting, a prompt file or an argument is wrong; exit code 2."""


class CheckpointError(RsaftError):
    """A checkpoint is damaged, of another format, or could not be written."""


class RunDirectoryError(RsaftError):
    """A run directory is in use, or holds something else."""


class NonFiniteError(RsaftError):
    """Rewards or gradients were not finite for too many updates in a row."""


class ExportError(RsaftError):
    """An exported model does not reproduce the trained one."""


class RewardError(RsaftError):
    """A reward gives no score, or nothing that training can use."""


class MissingExtraError(RsaftError, ImportError):
    """An optional dependency is not installed; the message holds the install line."""
