"""Errors about Databricks and storage services; the names that platforms catch."""

from __future__ import annotations

from llmfoundry.errors.base import NetworkError, UserError


class FailedToCreateSQLConnectionError(NetworkError):
    """No SQL connection."""


class FailedToConnectToDatabricksError(NetworkError):
    """No Databricks connection."""


class ClusterDoesNotExistError(UserError):
    """No such cluster."""


class ClusterInvalidAccessMode(UserError):
    """A cluster in an access mode that cannot be used."""


class FaultyDataPrepCluster(UserError):
    """The data preparation cluster failed."""


class MalformedUCTableError(UserError):
    """A Unity Catalog table that cannot be read."""


class UCNotEnabledError(UserError):
    """Unity Catalog is off."""


class DeltaTableNotFoundError(UserError):
    """No such Delta table."""


class TableDownloadError(UserError):
    """A table could not be downloaded."""


class StoragePermissionError(UserError):
    """Storage refused access."""


class InsufficientPermissionsError(UserError):
    """The user lacks a permission."""


class RemoteStoreError(NetworkError):
    """An object store that cannot be reached, refuses access, or has no such bucket; the message names address and setting."""
