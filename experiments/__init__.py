"""Runs that put the library together: parse, call the library, write a workdir."""
