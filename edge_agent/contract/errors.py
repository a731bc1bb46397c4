"""Errors of the formats: somebody gave us something that is not what it claims to be.

::

    ContractError (ValueError)
    ├── BadDigest        a digest that is not sha256:<64 hex>
    ├── BadVersion       a version that is not MAJOR.MINOR.PATCH[-PRE]
    ├── BadManifest      manifest.json unreadable, of an unknown format, or inconsistent
    ├── BadBundle        members missing, extra, truncated, altered, or beyond a limit
    ├── BadMember        golden or baseline unreadable
    └── BadAssignments   the assignments document unreadable or inconsistent
"""

from __future__ import annotations


class ContractError(ValueError):
    """Root: whoever produced the document has to act."""


class BadDigest(ContractError):
    """Not a digest of the form ``sha256:<64 lower-case hex digits>``."""


class BadVersion(ContractError):
    """Not a version of the form ``MAJOR.MINOR.PATCH[-PRERELEASE]``."""


class BadManifest(ContractError):
    """The manifest cannot be read, has an unknown format version, or contradicts itself."""


class BadBundle(ContractError):
    """The bundle's files are not the ones its manifest names."""


class BadMember(ContractError):
    """A member's content cannot be read."""


class BadAssignments(ContractError):
    """The assignments document cannot be read or contradicts itself."""
