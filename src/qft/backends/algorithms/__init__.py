"""Solvers that several backends share."""
