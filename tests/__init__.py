"""The tests of hpsearch."""
