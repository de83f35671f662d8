"""The contract of drivers: their protocols, and the data that they store and return."""
