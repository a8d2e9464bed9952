"""Shared by the tests: servers, clusters, ranks, faults, and states made by hand. No test is in here."""
