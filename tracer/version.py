"""The package's version, for whoever is below the package's front."""

__version__ = "0.1.0"
