"""Tests of the real command line with real processes."""
