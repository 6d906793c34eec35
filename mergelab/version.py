"""The version, in one place: the package, its wheel and everything it writes read it here."""

__version__ = "0.2.0"
