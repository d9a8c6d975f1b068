"""Errors, one class per remedy. Each message names the setting, its value, what is allowed and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class AgselError(Exception):
    """Base of every error that ds_agsel raises on purpose."""


class ConfigError(AgselError, ValueError):
    """A setting of the ds_config, or a combination of settings, that can't work."""


class ConfigErrors(ConfigError):
    """Several settings that can't work; the message is that of the first.

    Attributes:
        problems: a line for each, at least one.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(problems[0])
        self.problems = list(problems)


class BlockError(ConfigError):
    """The model's parameters can't be divided into blocks as asked."""


class CheckpointError(AgselError, RuntimeError):
    """A checkpoint that can't be written, or does not fit this run."""


class DataError(AgselError, ValueError):
    """Training or evaluation data that can't be used."""


class TrainingError(AgselError, RuntimeError):
    """Training that can't go on, such as a loss that stays non-finite."""
